"""One page that is whole in itself: its templates, its pictures, and names nobody obeys."""

import base64
import io
from hashlib import sha256
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from foreshot.errors import printable

SIDE = 96
"""Largest side of a picture in pixels, so that a page stays below 3 MB."""


def render(package: str, template: str, script: str = "", **values: Any) -> str:
    """A page from a package's template; whatever is put into it is escaped.

    Args:
        package: where the template is; those of `foreshot.report` are found from everywhere.
        template: its file.
        script: JavaScript of the page's own: the only one that a browser will run.
        values: what the template shows.
    """
    folders = [PackageLoader(name, ".") for name in (package, "foreshot.report")]
    pages = Environment(loader=ChoiceLoader(folders), autoescape=True, undefined=StrictUndefined)
    pages.filters["named"] = named
    digest = base64.b64encode(sha256(script.encode()).digest()).decode() if script else ""
    return pages.get_template(template).render(script=Markup(script), digest=digest, **values)  # noqa: S704 - our own


def named(text: str, longest: int = 80) -> str:
    """A name for people: what could be obeyed escaped, and not too long."""
    text, half = printable(text), longest // 2 - 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def data_uri(image: Tensor) -> str:
    """A picture, uint8 (C, H, W), in the address itself; no larger than `SIDE`."""
    levels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(levels[..., 0] if levels.shape[2] != 3 else levels)
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return png_uri(stream.getvalue())


def png_uri(data: bytes) -> str:
    """A PNG in the address itself."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
