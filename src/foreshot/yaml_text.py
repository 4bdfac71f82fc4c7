"""Text of the user's, and YAML: plain values alone, no key twice, and not too much of it."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from foreshot.errors import ForeshotError


def read_text(path: Path) -> str:
    """What a text file holds.

    Raises:
        ForeshotError: it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ForeshotError(f"{path}: expected UTF-8 text: {error}") from None


class _Loader(yaml.SafeLoader):
    """A safe loader of small trees: aliases and merge keys can make billions of a few lines."""

    MOST = 10_000

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} stands there twice")
        mapping = super().construct_mapping(node, deep)
        strange = [key for key in mapping if not isinstance(key, str)]
        if strange:
            raise yaml.YAMLError(f"the key {strange[0]!r} is no text")
        return mapping

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > self.MOST:
            raise yaml.YAMLError(f"a mapping has more than {self.MOST} keys")

    def get_single_data(self) -> Any:
        tree = super().get_single_data()
        left, count = [tree], 0
        while left:
            node = left.pop()
            left.extend(node.values() if isinstance(node, dict) else ())
            left.extend(node if isinstance(node, list | dict) else ())
            if (count := count + 1) > self.MOST:
                raise yaml.YAMLError(f"there are more than {self.MOST} values, aliases counted")
        return tree


def read_yaml(text: str, where: str) -> Any:
    """What a YAML text holds: plain values alone, and not too many.

    Raises:
        ForeshotError: it is no YAML; the sentence begins with `where`.
    """
    # Beside its own errors, PyYAML lets through what its constructors raise at values such as
    # `2001-99-99` and `!!bool x`.
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        raise ForeshotError(f"{where}: expected YAML: {' '.join(str(error).split())}") from None
