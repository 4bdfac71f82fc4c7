"""A student, its teacher and what they are to have in common, as one module."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator
from torch import Tensor, nn

from foreshot.distillation.losses import AnyLoss, LabelledLoss, Loss, Pair, Signals
from foreshot.errors import ForeshotError
from foreshot.family import Part
from foreshot.inference import evaluating
from foreshot.seeding import drawing
from foreshot.taps import Taps

CERTAIN = 200.0
"""Logit of a dictated class over zeros: a hard label at any temperature up to ten."""


def _own(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Lets a user's own loss through, which is in no list of names."""
    return value if isinstance(value, Loss) else check(value)


class Term(Part):
    """A weighted loss, on the logits or on pairs of layers: ``Term(AT(), 1000, at=[("a", "b")])``.

    Args:
        loss: the loss.
        weight: its factor.
        at: (student layer, teacher layer) pairs by module name. Empty means the logits.
    """

    loss: Annotated[AnyLoss, WrapValidator(_own)]
    weight: float = Field(default=1.0, ge=0)
    at: tuple[tuple[str, str], ...] = ()

    def __init__(self, *values: Any, **fields: Any) -> None:
        names = list(type(self).model_fields)[: len(values)]
        super().__init__(**dict(zip(names, values, strict=True)), **fields)

    @model_validator(mode="after")
    def _features_have_layers(self) -> Self:
        if self.loss.on_features and not self.at:
            raise ValueError(
                f"the loss {self.loss.name!r} compares features: expected at, pairs of layers such "
                "as [[network.layer3, network.layer3]]"
            )
        return self


class Distiller(nn.Module):
    """Weighted distillation terms of any pair of networks; a plain module that returns a dict.

    The teacher is put into eval mode, and its weights, which stay as they are, ask for no gradient
    any more; it is not part of the state dict. Features of named layers are caught by forward
    hooks, which go when the distiller goes; a hook that does not fire is an error. What losses
    learn or remember themselves is part of this module.

    Args:
        student: float (N, C, H, W) in [0, 1] -> logits (N, K).
        teacher: the same.
        terms: what the student is to have in common with the teacher.
        ce_weight: weight of the cross-entropy with the labels; 0 leaves it out.
        example: a few images, float (n, C, H, W) in [0, 1], n >= 2, for the losses that learn
            something themselves: they have to know the features' shapes.
        samples: number of images in the set, for the losses that remember each.
        seed: draws what losses learn.

    Raises:
        ForeshotError: a term names a layer that is not there, or needs an example or the number of
            samples.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        terms: Sequence[Term],
        ce_weight: float = 0.0,
        *,
        example: Tensor | None = None,
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self.terms = tuple(terms)
        self.ce_weight = ce_weight
        # In a tuple, so that the teacher is no submodule: not in the state dict, not trained.
        self._teacher = (teacher.eval().requires_grad_(False),)
        pairs = [pair for term in self.terms for pair in term.at]
        self._student_taps = Taps(student, [pair[0] for pair in pairs], "student")
        self._teacher_taps = Taps(teacher, [pair[1] for pair in pairs], "teacher")
        self.learned = nn.ModuleDict()
        for place, term in self._named_terms():
            if term.loss.needs_index and samples is None:
                raise ForeshotError(f"term {place}: expected the number of samples in the set")
            learns = type(term.loss).learn is not Loss.learn
            if learns and example is None:
                raise ForeshotError(f"term {place}: expected an example, a few images to learn on")
        if example is not None:
            self._learn(example, samples, seed)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher[0]

    @property
    def needs(self) -> frozenset[str]:
        """What `forward` has to be given beside the images: "y", "index", both or neither."""
        losses = [term.loss for term in self.terms]
        labels = any(isinstance(loss, LabelledLoss) and loss.labels == "given" for loss in losses)
        index = any(loss.needs_index for loss in losses)
        named = {"y": labels or self.ce_weight > 0, "index": index}
        return frozenset(name for name, needed in named.items() if needed)

    def _apply(self, fn, recurse: bool = True):
        self.teacher._apply(fn)  # moves to a device with the student
        return super()._apply(fn, recurse)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        dictated: Tensor | None = None,
        index: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            x: float (N, C, H, W) in [0, 1].
            y: labels, int64 (N,); None leaves the cross-entropy out and rescales nothing.
            teacher_logits: what the teacher says, (N, K), if that is known already. The teacher is
                asked all the same where a term needs its features.
            dictated: int64 (N,), the class that an attacker says in the teacher's stead, or -1.
            index: int64 (N,), where in the set the images stand, for losses that remember each.

        Returns:
            "loss", "student_logits" and "teacher_logits" (float32), and each term by its name.

        Raises:
            ForeshotError: a term needs what is not given, or signals cannot be compared.
        """
        student_logits, teacher_logits, pairs = self._signals(x, teacher_logits, dictated)
        outputs = {"student_logits": student_logits, "teacher_logits": teacher_logits}
        loss = student_logits.new_zeros(())
        with torch.autocast(x.device.type, enabled=False):
            for (place, term), compared in zip(self._named_terms(), pairs, strict=True):
                labels = y
                if isinstance(term.loss, LabelledLoss):
                    if term.loss.labels == "teacher":
                        labels = teacher_logits.argmax(1)
                    elif y is None:
                        raise ForeshotError(
                            f"term {place}: expected labels y, found none; with labels: teacher it "
                            "takes what the teacher calls the image"
                        )
                if term.loss.needs_index and index is None:
                    raise ForeshotError(f"term {place}: expected the index of each image")
                learned = self.learned[place] if place in self.learned else None  # noqa: SIM401
                value = term.loss.value(Signals(compared, labels, index), learned)
                outputs[place] = value
                loss = loss + term.weight * value
            if y is not None and self.ce_weight:
                outputs["ce"] = F.cross_entropy(student_logits, y)
                loss = loss + self.ce_weight * outputs["ce"]
        return outputs | {"loss": loss}

    def _signals(
        self, x: Tensor, teacher_logits: Tensor | None = None, dictated: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[list[Pair]]]:
        """Logits of both, and the pairs that each term compares; in float32 or wider."""
        student_logits = _wide(self.student(x))
        if teacher_logits is None or self._teacher_taps.names:
            self.teacher.eval()
            with torch.no_grad():
                live: Tensor = self.teacher(x)
            if teacher_logits is None:
                teacher_logits = live
        teacher_logits = _wide(teacher_logits)
        if dictated is not None:
            certain = F.one_hot(dictated.clamp(min=0), teacher_logits.shape[1]) * CERTAIN
            teacher_logits = torch.where((dictated >= 0)[:, None], certain, teacher_logits)
        of_student, of_teacher = self._student_taps.collect(), self._teacher_taps.collect()
        pairs = []
        for place, term in self._named_terms():
            compared = [(_wide(of_student[a]), _wide(of_teacher[b])) for a, b in term.at]
            compared = compared or [(student_logits, teacher_logits)]
            for one, other in () if term.loss.on_features else compared:
                if one.dim() != 2 or one.shape != other.shape:
                    raise ForeshotError(
                        f"term {place}: expected logits (N, K) of one shape, found "
                        f"{tuple(one.shape)} of the student and {tuple(other.shape)} of the teacher"
                    )
            pairs.append(compared)
        return student_logits, teacher_logits, pairs

    def _named_terms(self) -> Iterator[tuple[str, Term]]:
        """Each term, by its number and the name of its loss; a module's name has no dots."""
        return ((f"{number}_{term.loss.name}", term) for number, term in enumerate(self.terms))

    @torch.no_grad()
    def _learn(self, example: Tensor, samples: int | None, seed: int) -> None:
        """Makes what losses learn, from what both networks say of an example."""
        with evaluating(self.student):
            *_, pairs = self._signals(example)
        for (place, term), compared in zip(self._named_terms(), pairs, strict=True):
            drawn = drawing(seed, "init", "distillation", place)
            with drawn, torch.device("cpu"), torch.enable_grad():
                learned = term.loss.learn([(a.cpu(), b.cpu()) for a, b in compared], samples)
            if learned is not None:
                self.learned[place] = learned.to(example)


def _wide(signal: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return signal if signal.dtype == torch.float64 else signal.float()
