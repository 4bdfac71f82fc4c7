"""One run by several processes that train together, on Ray: `python ray_train.py [CONFIG OUT N]`.

It runs on this machine, or on the cluster at $RAY_ADDRESS. There, OUT and $FORESHOT_HOME have to
lie on a folder that all machines see.
"""

import os
import sys
from pathlib import Path

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

import foreshot.experiment
from foreshot.config import Config, load_config
from foreshot.store import home


def work(given: dict[str, Config | Path]) -> None:
    """What each process does: the whole run. Ray has told them of each other."""
    foreshot.experiment.run(given["config"], given["out"])


if __name__ == "__main__":
    preset, out, workers = [*sys.argv[1:], "digits", "together", "2"][:3]
    few = ["teacher.training.epochs=1", "student.training.epochs=1", "controls=[]"]
    config = load_config(preset, [] if sys.argv[1:] else few)
    folder = Path(out).resolve()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_ENABLE_STATE_TRACKING": "0"}
    ray.init(
        os.environ.get("RAY_ADDRESS", "local"),
        runtime_env={"env_vars": {"FORESHOT_HOME": str(home().resolve())}},
    )
    TorchTrainer(
        work,
        train_loop_config={"config": config, "out": folder},
        scaling_config=ScalingConfig(num_workers=int(workers), use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(storage_path=str(folder.with_name(f"{folder.name}-ray"))),
    ).fit()
    print(f"Run folder: {folder}")
