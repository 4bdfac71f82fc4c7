"""MLflow: a server, or a folder that its page reads."""

import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from foreshot.extras import imported
from foreshot.files import locked
from foreshot.trackers.base import Tracker

BATCH = 100
"""Params that a server takes at once."""


class MLflow(Tracker):
    """A run of MLflow: on the server of `MLFLOW_TRACKING_URI`, or in a folder.

    Its experiment is `MLFLOW_EXPERIMENT_NAME`, or "foreshot".
    """

    package = "mlflow"
    folder = "mlruns"
    environment: ClassVar[Mapping[str, str]] = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder is all that mlflow-skinny can write alone
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # with its 7, a run waits minutes for a dead server
    }

    def __init__(self, folder: Path, name: str, params: Mapping[str, Any]) -> None:
        mlflow = imported(self.package, "track", self.package)
        self._kept = mlflow.entities
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "foreshot")
        # Runs of a sweep may come at once, and a folder has no database to keep them apart.
        with nullcontext() if uri else locked(folder / ".lock"):
            self._client = mlflow.MlflowClient(uri or folder.as_uri())
            there = self._client.get_experiment_by_name(title)
            home = there.experiment_id if there else self._client.create_experiment(title)
        self._run = self._client.create_run(home, run_name=name).info.run_id
        pairs = iter(params.items())
        while batch := [self._kept.Param(key, str(value)) for key, value in islice(pairs, BATCH)]:
            self._client.log_batch(self._run, params=batch)

    def log(self, stage: str, values: Mapping[str, float], images: int) -> None:
        self._metrics({f"{stage}/{name}": value for name, value in values.items()}, images)

    def summarize(self, values: Mapping[str, float]) -> None:
        self._metrics(values, 0)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")

    def _metrics(self, values: Mapping[str, float], step: int) -> None:
        now = round(1000 * time.time())
        metrics = [self._kept.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)
