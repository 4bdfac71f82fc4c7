"""What may stand at a key of a config, and in one sentence what is wrong with what does."""

import reprlib
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from foreshot.errors import nearest
from foreshot.family import Member


def sentence(error: ValidationError, root: type[BaseModel]) -> str:
    """The first thing that is wrong with a config, and the nearest thing that would be right.

    Args:
        error: what pydantic says.
        root: what was validated.
    """
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    kind, context, given = first["type"], first.get("ctx", {}), first["input"]
    if kind == "extra_forbidden":
        models = models_of(annotation_at(root, loc[:-1]))
        siblings = list(models[0].model_fields) if models else []
        return f"{_dotted(loc, root)}: no such key; {nearest(loc[-1], siblings)}"
    if kind == "union_tag_invalid":
        family = members_of(annotation_at(root, loc))
        name = given["name"]
        return f"{_dotted(loc, root)}.name: found {_shown(name)}; {nearest(name, family)}"
    if kind in ("union_tag_not_found", "model_attributes_type"):
        family = members_of(annotation_at(root, loc))
        return f"{_dotted(loc, root)}: expected {{name: ...}}, one of {', '.join(family)}"
    if kind == "literal_error":
        options = [
            option.strip("' ") for option in context["expected"].replace(" or ", ",").split(",")
        ]
        return f"{_dotted(loc, root)}: found {_shown(given)}; {nearest(given, options)}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{_dotted(loc, root) or 'config'}: {message}, found {_shown(given)}"


def _shown(value: Any) -> str:
    """A value, cut short."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxstring, short.maxother = 3, 4, 80, 80
    try:
        return short.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a very long {type(value).__name__}"


def _unwrap(annotation: Any) -> list[Any]:
    """The plain types of an annotation: without Annotated, Optional and unions."""
    if get_origin(annotation) is Annotated:
        return _unwrap(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [plain for part in get_args(annotation) for plain in _unwrap(part)]
    return [annotation]


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models that may stand there."""
    return [c for c in _unwrap(annotation) if isinstance(c, type) and issubclass(c, BaseModel)]


def members_of(annotation: Any) -> dict[str, type[Member]]:
    """The members of a tagged union, by name; empty for any other annotation."""
    members = [model for model in models_of(annotation) if issubclass(model, Member)]
    return {member.model_fields["name"].default: member for member in members}


def annotation_at(annotation: Any, path: Sequence[str]) -> Any:
    """The annotation at a path of keys, item numbers and the tags that pydantic puts between."""
    for part in path:
        family = members_of(annotation)
        if part in family:
            annotation = family[part]
        elif get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
        else:
            fields = [m.model_fields[part] for m in models_of(annotation) if part in m.model_fields]
            if not fields:
                return None
            annotation = fields[0].annotation
    return annotation


def spelled_out(value: Any, annotation: Any) -> Any:
    """What a config has at a key, in which a bare name of a family's member is `{name: ...}`.

    Args:
        value: what YAML made of it.
        annotation: what may stand there.
    """
    family = members_of(annotation)
    if isinstance(value, str) and family:
        return {"name": value}
    if isinstance(value, list):
        return [spelled_out(item, annotation_at(annotation, ["0"])) for item in value]
    if isinstance(value, dict):
        name = value.get("name")
        member = family.get(name, annotation) if isinstance(name, str) else annotation
        return {k: spelled_out(v, annotation_at(member, [str(k)])) for k, v in value.items()}
    return value


def json_schema(root: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a config as it is written, in which a bare name is a member, too."""
    return _with_names(root.model_json_schema())


def _with_names(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_names(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _with_names(part) for key, part in schema.items()}
    family = schema.get("discriminator", {}).get("mapping")
    return schema | {"oneOf": [*schema["oneOf"], {"enum": [*family]}]} if family else schema


def _dotted(loc: Sequence[str], root: type[BaseModel]) -> str:
    """A location as the user writes it: without the tags that pydantic puts between."""
    parts: list[str] = []
    for depth, part in enumerate(loc):
        if part not in members_of(annotation_at(root, loc[:depth])):
            parts.append(part if part.isprintable() else repr(part))
    return ".".join(parts)
