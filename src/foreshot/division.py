"""Who has which images: teacher, student, attacker, defender, and whoever evaluates."""

from pathlib import Path
from typing import NamedTuple

from foreshot.config import Config
from foreshot.data import ImageSet, Splits
from foreshot.data.tensor import TensorFile, save_images
from foreshot.defences import Monitor, Screen
from foreshot.defences.conformal import check_enough
from foreshot.errors import ForeshotError
from foreshot.store import Store, source_digest


class Parts(NamedTuple):
    """Who has which images.

    Args:
        taught: what the teacher is trained on.
        transfer: what the student is distilled on, and the attacker poisons.
        clean: the defender's own; None without a defence that has any.
        surrogate: the attacker's own, to train a teacher on; None if there are none.
        test: what is evaluated on, and nothing else is done with.
    """

    taught: ImageSet
    transfer: ImageSet
    clean: ImageSet | None
    surrogate: ImageSet | None
    test: ImageSet


def divide(config: Config, store: Store, cache: Path) -> Parts:
    """Loads the dataset and divides it between those who take part.

    Args:
        config: the experiment.
        store: where data that is generated is kept.
        cache: folder for downloads.

    Raises:
        ForeshotError: the target is not one of the classes, too few images are left to somebody,
            or a defence lacks what it needs.
    """
    splits = _load(config, store, cache)
    taught, surrogate, clean = splits.train, None, None
    if config.surrogate is not None and config.surrogate.data == "disjoint":
        taught, surrogate = taught.cut(0.5, config.seed, "surrogate.data")
    transfer, count = taught, _defended(config)
    if count:
        if count >= len(taught):
            raise ForeshotError(
                f"defender.clean: expected fewer than the {len(taught)} training images, "
                f"found {count}"
            )
        transfer, clean = taught.cut(count / len(taught), config.seed, "defender.clean")
    return Parts(taught, transfer, clean, surrogate, splits.test)


def _load(config: Config, store: Store, cache: Path) -> Splits:
    """What the dataset has, less the test images if others are evaluated on."""
    dataset = config.data
    if not dataset.generated:
        splits = dataset.load(cache)
    else:

        def generate(folder: Path) -> None:
            for name, images in zip(("train", "test"), dataset.load(cache), strict=True):
                save_images(folder / f"{name}.safetensors", images)

        inputs = {
            "data": dataset.model_dump(mode="json"),
            "source": source_digest("data", "seeding.py"),
        }
        folder = store.stage("data", inputs, generate).folder
        splits = TensorFile(
            path=folder / "train.safetensors", test_path=folder / "test.safetensors"
        ).load(cache)
    classes = len(splits.train.classes)
    if config.target >= classes:
        raise ForeshotError(
            f"target: expected 0 to {classes - 1} ({classes} classes), found {config.target}"
        )
    return splits.validation(config.validation, config.seed) if config.validation else splits


def _defended(config: Config) -> int:
    """How many images the defender keeps; refuses a defence that lacks what it needs."""
    defence, defender = config.defence, config.defender
    if defence is None:
        return 0
    if "clean" in defence.needs and not defender.clean:
        raise ForeshotError(f"defence {defence.name}: expected defender.clean > 0, found 0")
    if "labels" in defence.needs and not defender.labels:
        raise ForeshotError(f"defence {defence.name}: expected defender.labels true, found false")
    by_p = defender.level is None and defender.remove is None
    if isinstance(defence, Screen) and by_p and defender.clean:
        check_enough(defence, defender.clean, defender.drop)
    if isinstance(defence, Monitor):
        check_enough(defence, defender.clean, defence.alarms)
    return defender.clean
