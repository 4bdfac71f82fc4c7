"""Configs beside each other: their keys, what differs, and the command that comes to the same."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from foreshot.config import Config, load_config, presets
from foreshot.errors import ForeshotError, printable

ABSENT = object()
"""What a config has under a key that it does not have."""


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree of dicts and lists of dicts, by the dotted keys that `--set` takes."""
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, node in tree.items()
        for key, value in flat(node, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def leaves(config: Config) -> dict[str, Any]:
    """All keys of a config and their values."""
    return flat(config.model_dump(mode="json"))


def nearest_preset(config: Config) -> tuple[str, Config]:
    """The preset that differs in the fewest keys; one of the same dataset if there is one."""
    mine = leaves(config)

    def distance(item: tuple[str, Config]) -> tuple[bool, int]:
        theirs = leaves(item[1])
        differ = [
            k for k in mine.keys() | theirs.keys() if mine.get(k, ABSENT) != theirs.get(k, ABSENT)
        ]
        return "data.name" in differ, len(differ)

    return min(((name, load_config(name)) for name in presets()), key=distance)


def differences(config: Config, base: Config) -> list[str]:
    """The keys whose values another config does not have."""
    theirs = leaves(base)
    return [key for key, value in leaves(config).items() if value != theirs.get(key, ABSENT)]


def command(config: Config, preset: str) -> str | None:
    """The `foreshot run` that runs the config anew; None if no `--set` of a preset comes to it."""
    values, settings = leaves(config), list[str]()
    try:
        while changed := differences(config, load_config(preset, settings)):
            # Names first, the outermost before all: a member of a family brings its own keys along.
            names = sorted((key for key in changed if key.endswith("name")), key=_depth)
            now = [key for key in names if _depth(key) == _depth(names[0])] or changed
            more = [f"{key}={_yaml(values[key])}" for key in now]
            if more[0] in settings:
                return None
            settings += more
    except ForeshotError:
        return None
    words = ["foreshot", "run", preset, *(word for one in settings for word in ("--set", one))]
    return shlex.join(words) if load_config(preset, settings) == config else None


def _depth(key: str) -> int:
    return key.count(".")


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value)


def varying(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """The keys in which configs differ, and the value that each of them has there.

    A part that some leave out counts by its name, and its own keys, as those of different members
    of a family, only among the configs that have them.
    """
    trees = [config.model_dump(mode="json") for config in configs]
    found = [flat(tree) for tree in trees]
    for key in {key for one in found for key, value in one.items() if value is None}:
        for one, tree in zip(found, trees, strict=True):
            if isinstance(part := _at(tree, key), dict):
                one.pop(f"{key}.name", None)
                one[key] = part.get("name", "yes")
    keys = dict.fromkeys(key for one in found for key in one)
    columns = {key: [one.get(key, ABSENT) for one in found] for key in keys}
    varied = {
        key: values
        for key, values in columns.items()
        if len({shown(value) for value in values if value is not ABSENT}) > 1
    }
    return {key: values for key, values in varied.items() if not _implied(key, varied)}


def _implied(key: str, varied: Mapping[str, list[Any]]) -> bool:
    """Whether a key of a member of a family only repeats which member it is."""
    for other, names in varied.items():
        if key != other and key.startswith(f"{short(other)}."):
            told = {(n, shown(v)) for n, v in zip(names, varied[key], strict=True)}
            if len(told) == len(set(names)):
                return True
    return False


def _at(tree: Any, key: str) -> Any:
    """What stands under a dotted key."""
    for name in key.split("."):
        if isinstance(tree, list):
            tree = dict(enumerate(tree)).get(int(name), ABSENT)
        elif isinstance(tree, dict):
            tree = tree.get(name, ABSENT)
    return tree


def short(key: str) -> str:
    """A key as a heading: the name of a part is the part."""
    return key.removesuffix(".name")


def shown(value: Any) -> str:
    """A value as people read it."""
    if value is None or value is ABSENT:
        return "none" if value is None else "–"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
