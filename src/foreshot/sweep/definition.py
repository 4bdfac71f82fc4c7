"""What a sweep runs: one preset, the settings that all cells share, and those that differ."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from foreshot.config import Config, load_config, presets
from foreshot.errors import ForeshotError
from foreshot.family import Part
from foreshot.schema import sentence
from foreshot.store import content_hash
from foreshot.yaml_text import read_text, read_yaml

MOST = 10_000
"""Cells of a sweep, and values of a key."""
_RANGE = re.compile(r"(?<![^,])\s*(-?\d{1,18}):(-?\d{1,18})\s*(?![^,])")


@dataclass(frozen=True)
class Cell:
    """One experiment of a sweep.

    Args:
        settings: what was set, such as "attack.rate=0.01", in order.
        varied: those of them that other cells set otherwise.
        config: what comes of it.
    """

    settings: tuple[str, ...]
    varied: tuple[str, ...]
    config: Config

    @cached_property
    def name(self) -> str:
        """The name of its run folder: what is special about it, and a hash of the whole config."""
        said = "_".join(_short(setting) for setting in self.varied)[:80]
        return f"{said}-{content_hash(self.config.model_dump(mode='json'))[:8]}"

    @cached_property
    def values(self) -> dict[str, Any]:
        """What was set, by key; lists and mappings as YAML."""
        found = {}
        for key, _, text in (setting.partition("=") for setting in self.settings):
            value = read_yaml(text, key)
            found[key] = value if isinstance(value, str | int | float | None) else text
        return found


class Sweep(Part):
    """Experiments that differ in some of their settings; their number is that of all combinations.

    Args:
        preset: a preset, or the file of a config, looked for from the folder of the sweep's file.
        set: settings of all cells, such as "attack.epsilon=8".
        grid: for a key the values that it takes, a list or text such as "0:3" (0, 1 and 2) or
            "pgd,fgsm". Keys are set in this order, and cross.
        cells: settings that go together, a list for each cell; they cross with the grid.
    """

    preset: str = "signs"
    set: tuple[str, ...] = ()
    grid: dict[str, tuple[Any, ...]] = Field(default={}, max_length=100)
    cells: tuple[tuple[str, ...], ...] = ()

    @field_validator("grid", mode="before")
    @classmethod
    def _spell_out(cls, grid: Any) -> Any:
        if not isinstance(grid, dict):
            return grid
        spelt = {}
        for key, given in grid.items():
            found = values(given, f"grid.{key}") if isinstance(given, str) else given
            # YAML reads 1:3 without quotes as a time of day.
            if not isinstance(found, list | tuple) or not found:
                raise ForeshotError(
                    f"grid.{key}: expected a list of values, or text such as '0:3' in quotes, "
                    f"found {given!r}"
                )
            spelt[key] = found
        return spelt

    def expand(self) -> list[Cell]:
        """All cells, each once, in order; every config is validated.

        Raises:
            ForeshotError: nothing varies, there are too many cells, or a config is not valid.
        """
        if not self.grid and not self.cells:
            raise ForeshotError("sweep: expected a grid or cells, found neither")
        axes = [[f"{key}={_flow(value)}" for value in row] for key, row in self.grid.items()]
        count = prod(len(axis) for axis in axes) * max(1, len(self.cells))
        if count > MOST:
            raise ForeshotError(f"sweep: expected at most {MOST:,} cells, found {count:,}")
        found: dict[str, Cell] = {}
        for together in self.cells or ((),):
            for point in product(*axes):
                varied = (*together, *point)
                settings = (*self.set, *varied)
                cell = Cell(settings, varied, load_config(self.preset, settings))
                found.setdefault(content_hash(cell.config.model_dump(mode="json")), cell)
        return list(found.values())


def load_sweep(source: str, grid: Sequence[str] = (), settings: Sequence[str] = ()) -> Sweep:
    """The sweep of a file, or of a preset, with keys of the grid and settings added by hand.

    Args:
        source: a file with any of the keys of `Sweep`; or a preset or the file of a config.
        grid: such as "attack.rate=0.001,0.01" or "seed=0:3".
        settings: of all cells, such as "attack.epsilon=8".

    Raises:
        ForeshotError: no such file, or it is not what it should be.
    """
    tree: Any = {}
    path = Path(source)
    if source not in presets() and path.is_file():
        tree = read_yaml(read_text(path), source)
    if not isinstance(tree, dict) or not tree.keys() & Sweep.model_fields.keys():
        tree = {"preset": source}
    elif isinstance(own := tree.get("preset"), str) and own not in presets():
        tree = {**tree, "preset": str(path.parent / own)}
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as error:
        raise ForeshotError(f"{source}: {sentence(error, Sweep)}") from None
    more = dict(sweep.grid)
    for text in grid:
        key, separator, given = text.partition("=")
        if not separator:
            raise ForeshotError(f"--grid {text}: expected KEY=VALUES, such as seed=0:3")
        more[key] = tuple(values(given, f"--grid {text}"))
    return sweep.model_copy(update={"grid": more, "set": (*sweep.set, *settings)})


def values(text: str, where: str) -> list[Any]:
    """The values of a key: YAML between commas; a:b stands for the integers from a to b - 1.

    Raises:
        ForeshotError: it is no YAML, a range is empty or too long, or there is nothing.
    """

    def spelt(match: re.Match[str]) -> str:
        first, last = int(match[1]), int(match[2])
        if not 0 < last - first <= MOST:
            raise ForeshotError(
                f"{where}: expected a range that goes up, such as 0:3, of at most {MOST:,} "
                f"integers, found {match[0].strip()}"
            )
        return ",".join(map(str, range(first, last)))

    found = read_yaml(f"[{_RANGE.sub(spelt, text)}]", where)
    if not isinstance(found, list) or not found:
        raise ForeshotError(f"{where}: expected values between commas, found none")
    return found


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("...\n").rstrip("\n")


def _short(setting: str) -> str:
    """A setting in a file's name: `attack.rate=0.01` is rate-0.01, `attack.name=pgd` attack-pgd."""
    key, _, value = setting.partition("=")
    word = key.removesuffix(".name").rpartition(".")[2]
    return re.sub(r"[^\w.+-]+", "-", f"{word}-{value}").strip("-.")
