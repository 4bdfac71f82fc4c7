"""Families: each member is a frozen pydantic model, its own configuration and its own code."""

from collections.abc import Iterator
from inspect import cleandoc
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict

P = TypeVar("P", bound="Part")


class Part(BaseModel):
    """A part of a config: frozen, without unknown keys, and every number in it finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    def outermost(self, kind: type[P]) -> Iterator[P]:
        """The parts of a kind that it is made of, itself among them; not what lies in them."""
        if isinstance(self, kind):
            yield self
            return
        for field in type(self).model_fields:
            value = getattr(self, field)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Part):
                    yield from part.outermost(kind)


class Member(Part):
    """A member of a family (a dataset, a model, a trigger, an attack, a loss).

    A subclass declares ``name: Literal["..."] = "..."``, the tag by which a config picks it; its
    fields are its parameters, validated when it is made and frozen from then on.
    """

    shared: ClassVar[frozenset[str]] = frozenset()
    """Parameters of all of the family, which stay when a config names another member; of others,
    only those that both have from one class, with the same default."""

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring, which `foreshot list` prints."""
        return cleandoc(cls.__doc__ or "").split("\n", 1)[0]

    @property
    def title(self) -> str:
        """The name by which a config picks it."""
        return type(self).model_fields["name"].default


M = TypeVar("M", bound="Member")


def members(kind: type[M], union: Any) -> dict[str, type[M]]:
    """``{name: class}`` of a tagged union of members, in the order in which it lists them."""
    tagged = get_args(union)[0]
    classes: tuple[type[M], ...] = get_args(tagged) or (tagged,)
    assert all(issubclass(member, kind) for member in classes)
    return {member.model_fields["name"].default: member for member in classes}
