"""The one exception that a user is meant to read."""

import difflib
from collections.abc import Iterable
from typing import Any


class ForeshotError(Exception):
    """Bad input: one sentence that names the file or key, what was expected and what was found.

    The command line prints it and ends with exit code 2.
    """


def nearest(name: Any, options: Iterable[str]) -> str:
    """A hint: the option that the user most likely meant, or all of them."""
    options = list(options)
    close = difflib.get_close_matches(name, options, n=1) if isinstance(name, str) else []
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(options)}"


def printable(text: str) -> str:
    """Text from outside without what a terminal would obey, or UTF-8 cannot hold."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def brief(error: Exception) -> str:
    """What a foreign error says, on one line and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
