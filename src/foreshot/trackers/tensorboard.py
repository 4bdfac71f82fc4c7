"""TensorBoard: files that its page reads."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foreshot.extras import imported
from foreshot.trackers.base import Tracker


class TensorBoard(Tracker):
    """A folder of TensorBoard: curves, and the config and the metrics on its page HPARAMS.

    Events are written one by one, by the package's own parts that never look for TensorFlow.
    """

    package = "tensorboard"
    folder = "tensorboard"

    def __init__(self, folder: Path, name: str, params: Mapping[str, Any]) -> None:
        proto = "tensorboard.compat.proto"
        self._event = imported(f"{proto}.event_pb2", "track", self.package).Event
        self._hparams = imported("tensorboard.plugins.hparams.summary_v2", "track", self.package)
        records = imported("tensorboard.summary.writer.record_writer", "track", self.package)
        where = folder / name
        where.mkdir(parents=True, exist_ok=True)
        now = time.time()
        file = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = records.RecordWriter((where / file).open("xb", buffering=0))
        self._write(0, file_version="brain.Event:2")
        plain = {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in params.items()
        }
        self._write(0, summary=self._hparams.hparams_pb(plain, trial_id=name))

    def log(self, stage: str, values: Mapping[str, float], images: int) -> None:
        self._scalars({f"{stage}/{name}": value for name, value in values.items()}, images)

    def summarize(self, values: Mapping[str, float]) -> None:
        self._scalars({f"metrics/{name}": value for name, value in values.items()}, 0)

    def close(self, failed: bool) -> None:
        hparams = self._hparams
        ended = hparams.plugin_data_pb2.SessionEndInfo(
            status=hparams.api_pb2.STATUS_FAILURE if failed else hparams.api_pb2.STATUS_SUCCESS,
            end_time_secs=time.time(),
        )
        data = hparams.plugin_data_pb2.HParamsPluginData(session_end_info=ended)
        names = hparams.metadata
        summary = hparams.summary_pb2.Summary()
        summary.value.add(
            tag=names.SESSION_END_INFO_TAG,
            metadata=names.create_summary_metadata(data),
            tensor=names.NULL_TENSOR,
        )
        self._write(0, summary=summary)
        self._writer.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        summary = self._hparams.summary_pb2.Summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        self._write(step, summary=summary)

    def _write(self, step: int, **content: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **content)
        self._writer.write(event.SerializeToString())
