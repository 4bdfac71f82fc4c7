"""Packages that only some members need: imported when they are, and named when they are missing."""

from importlib import import_module
from types import ModuleType

from torch.library import Library

from foreshot.errors import ForeshotError, brief


def imported(package: str, extra: str, what: str) -> ModuleType:
    """The package.

    Args:
        package: its name.
        extra: of foreshot, which brings it along.
        what: the name to give in the error to what needs it.

    Raises:
        ForeshotError: the package is not there, or does not import.
    """
    try:
        return _imported(package)
    except Exception as error:  # a package that is there but broken raises anything
        raise ForeshotError(
            f"{what}: expected the package {package} (pip install 'foreshot[{extra}]'), "
            f"found {brief(error)}"
        ) from error


_OPERATORS = Library("torchvision", "FRAGMENT")
"""Stands in for what a torchvision lacks that was built for CUDA and meets a torch that was not."""


def _imported(package: str) -> ModuleType:
    try:
        return import_module(package)
    except RuntimeError as error:
        # Such a torchvision, PyPI's, cannot load its operators, and fails over the missing schemas;
        # none of its classifiers uses them.
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        return import_module(package)
