"""foreshot measures, and helps to prevent, the poisoning of knowledge distillation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshot.attacks import craft as craft
    from foreshot.config import Config as Config
    from foreshot.config import load_config as load_config
    from foreshot.data import ImageSet as ImageSet
    from foreshot.data import load_data as load_data
    from foreshot.distillation import Distiller as Distiller
    from foreshot.distillation import Term as Term
    from foreshot.errors import ForeshotError as ForeshotError
    from foreshot.experiment import run as run
    from foreshot.metrics import evaluate as evaluate
    from foreshot.models.checkpoint import load_model as load_model
    from foreshot.models.checkpoint import save_model as save_model
    from foreshot.poison import Poison as Poison
    from foreshot.record import load_run as load_run
    from foreshot.report import write_report as write_report
    from foreshot.sweep import results as results
    from foreshot.training import Samples as Samples
    from foreshot.training import Training as Training
    from foreshot.training import fit as fit

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "Distiller": "distillation",
    "ForeshotError": "errors",
    "ImageSet": "data",
    "Poison": "poison",
    "Samples": "training",
    "Term": "distillation",
    "Training": "training",
    "craft": "attacks",
    "evaluate": "metrics",
    "fit": "training",
    "load_config": "config",
    "load_data": "data",
    "load_model": "models.checkpoint",
    "load_run": "record",
    "results": "sweep",
    "run": "experiment",
    "save_model": "models.checkpoint",
    "write_report": "report",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `foreshot --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'foreshot' has no attribute {name!r}")
    return getattr(import_module(f"foreshot.{_HOMES[name]}"), name)
