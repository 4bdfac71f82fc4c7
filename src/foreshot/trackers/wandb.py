"""Weights & Biases: offline, unless the user says otherwise."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from foreshot.extras import imported
from foreshot.trackers.base import Tracker


class WandB(Tracker):
    """A run of Weights & Biases: a folder for `wandb sync`, or what `WANDB_MODE` says.

    Its project is `WANDB_PROJECT`, or "foreshot".
    """

    package = "wandb"
    folder = "wandb"
    environment: ClassVar[Mapping[str, str]] = {
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
    }

    def __init__(self, folder: Path, name: str, params: Mapping[str, Any]) -> None:
        wandb = imported(self.package, "track", self.package)
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "foreshot"),
            name=name,
            config=dict(params),
            dir=folder.parent,
            # It says nothing, and gathers nothing about the machine, the code or the packages.
            settings=wandb.Settings(
                reinit="create_new",
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def log(self, stage: str, values: Mapping[str, float], images: int) -> None:
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/images")
        self._run.log(
            {f"{stage}/{name}": value for name, value in values.items()}
            | {f"{stage}/images": images}
        )

    def summarize(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(values)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
