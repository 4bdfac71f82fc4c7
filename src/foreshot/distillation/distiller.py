"""A student, its teacher and what they are to have in common, as one module."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foreshot.distillation.losses import AnyLoss
from foreshot.errors import ForeshotError
from foreshot.family import Part

CERTAIN = 200.0
"""Logit of a dictated class over zeros: a hard label at any temperature up to ten."""


class Term(Part):
    """A weighted loss, on the logits or on pairs of layers.

    Args:
        loss: the loss.
        weight: its factor.
        at: (student layer, teacher layer) pairs by module name; the loss is summed over them.
            Empty means the logits.
    """

    loss: AnyLoss
    weight: float = Field(default=1.0, ge=0)
    at: tuple[tuple[str, str], ...] = ()


class Distiller(nn.Module):
    """Weighted distillation terms of any pair of networks; a plain module that returns a dict.

    The teacher is frozen, in eval mode, unchanged, and not part of the state dict. Features of
    named layers are caught by forward hooks; a hook that does not fire is an error.

    Args:
        student: float (N, C, H, W) in [0, 1] -> logits (N, K).
        teacher: the same.
        terms: what the student is to have in common with the teacher.
        ce_weight: weight of the cross-entropy with the labels; 0 leaves it out.

    Raises:
        ForeshotError: a term names a layer that is not there.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        terms: Sequence[Term],
        ce_weight: float = 0.0,
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

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher[0]

    def _apply(self, fn, recurse: bool = True):
        self.teacher._apply(fn)  # moves to a device with the student
        return super()._apply(fn, recurse)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        dictated: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            x: float (N, C, H, W) in [0, 1].
            y: labels, int64 (N,); None leaves the cross-entropy out and rescales nothing.
            teacher_logits: what the teacher says, (N, K), if that is known already. The teacher is
                asked all the same where a term needs its features.
            dictated: int64 (N,), the class that an attacker says in the teacher's stead, or -1.

        Returns:
            "loss", "student_logits" and "teacher_logits" (float32), and each term by its name.
        """
        student_logits = self.student(x).float()
        if teacher_logits is None or self._teacher_taps.names:
            self.teacher.eval()
            with torch.no_grad():
                live: Tensor = self.teacher(x)
            if teacher_logits is None:
                teacher_logits = live
        teacher_logits = teacher_logits.float()
        if dictated is not None:
            certain = F.one_hot(dictated.clamp(min=0), teacher_logits.shape[1]) * CERTAIN
            teacher_logits = torch.where((dictated >= 0)[:, None], certain, teacher_logits)
        student_features = self._student_taps.collect()
        teacher_features = self._teacher_taps.collect()
        outputs = {"student_logits": student_logits, "teacher_logits": teacher_logits}
        loss = student_logits.new_zeros(())
        with torch.autocast(x.device.type, enabled=False):
            for number, term in enumerate(self.terms):
                signals = [
                    (student_features[a].float(), teacher_features[b].float()) for a, b in term.at
                ] or [(student_logits, teacher_logits)]
                value = torch.stack([term.loss(*pair) for pair in signals]).sum()
                outputs[f"{number}.{term.loss.name}"] = value
                loss = loss + term.weight * value
            if y is not None and self.ce_weight:
                outputs["ce"] = F.cross_entropy(student_logits, y)
                loss = loss + self.ce_weight * outputs["ce"]
        return outputs | {"loss": loss}


class Taps:
    """Outputs of named layers, caught while a network runs.

    Raises:
        ForeshotError: the network has no such layer; or, from `collect`, it was not run.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], role: str) -> None:
        self.names = sorted(set(names))
        self.role = role
        self._caught: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        layers = dict(network.named_modules())
        for name in self.names:
            if name not in layers:
                known = ", ".join(sorted(n for n in layers if n and n.count(".") < 2))
                raise ForeshotError(f"{role} layer {name!r}: expected one of {known}")
            self._handles.append(layers[name].register_forward_hook(self._catch(name)))

    def _catch(self, name: str):
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self._caught[name] = output

        return hook

    def collect(self) -> dict[str, Tensor]:
        """What was caught since the last call."""
        silent = [name for name in self.names if name not in self._caught]
        if silent:
            raise ForeshotError(f"{self.role} layer {silent[0]!r}: it did not run in the forward")
        caught, self._caught = self._caught, {}
        return caught
