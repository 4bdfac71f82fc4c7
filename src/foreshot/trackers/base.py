"""What a tracker has to be able to do."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar


class Tracker(ABC):
    """One run, as a package for tracking keeps it; each method may raise what the package raises.

    Args:
        folder: for what is kept on this machine; it need not be there.
        name: of the run.
        params: the resolved config, by dotted key.
    """

    package: ClassVar[str]
    folder: ClassVar[str]
    """What its folder is called, beside the run folder."""
    environment: ClassVar[Mapping[str, str]] = {}
    """Variables that the package reads when it is imported, where the user has not set them."""

    @abstractmethod
    def __init__(self, folder: Path, name: str, params: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def log(self, stage: str, values: Mapping[str, float], images: int) -> None:
        """Keeps what an epoch came to.

        Args:
            stage: what is trained.
            values: by name.
            images: how many the stage has seen, those before an interruption with them.
        """

    @abstractmethod
    def summarize(self, values: Mapping[str, float]) -> None:
        """Keeps the numbers of `metrics.json`, by dotted key."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Ends the run."""
