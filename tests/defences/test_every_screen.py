"""One contract over every screen, and what a defender must not be able to know."""

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any, ClassVar, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from conftest import ARCHITECTURE, Deaf, Rule, Tiny, stripes
from foreshot.compute import CPU
from foreshot.defences import SCREENS, Combined, Screen, judge
from foreshot.defences.base import WANTED
from foreshot.defences.pool import Pool
from foreshot.defences.screens import LabelDisagreement, LocalDimension
from foreshot.errors import ForeshotError
from foreshot.models import build
from foreshot.models.checkpoint import state_digest
from foreshot.poison import Poison
from foreshot.triggers import Trigger
from foreshot.views import AttackerView, DefenderView

JUMPY = {"combined", "scale_up"}
"""Screens that count: a rounding of the networks' answers may tip an image by a whole step."""


def seen(tiny: Tiny, count: int = 90) -> DefenderView:
    transfer = tiny.train.select(torch.arange(count))
    student = build(ARCHITECTURE, transfer.images, 4, 0, "student")
    second = build(ARCHITECTURE, transfer.images, 4, 0, "second")
    return DefenderView(
        transfer, tiny.teacher, student, stripes(80, 5), 0, CPU, second=second.train()
    )


@pytest.mark.parametrize("key", SCREENS)
def test_a_screen_scores_every_image_and_changes_nothing(
    key: str, tiny: Tiny, keep_rng: None
) -> None:
    view, screen = seen(tiny), SCREENS[key].model_validate({})
    assert view.student is not None
    assert view.second is not None
    networks: list[nn.Module] = [view.teacher, view.student, view.second]
    before = [(state_digest(network), network.training) for network in networks]
    scores = screen.score(view)
    for part, count in ((scores.transfer, 90), (scores.clean, 40)):
        assert part.shape == (count,)
        assert part.dtype == torch.float64
        assert torch.isfinite(part).all()
    assert scores.transfer.unique().numel() > 1
    again = screen.score(seen(tiny))
    assert torch.equal(again.transfer, scores.transfer)
    assert torch.equal(again.clean, scores.clean)
    assert [(state_digest(network), network.training) for network in networks] == before


@pytest.mark.parametrize("key", SCREENS)
def test_scores_go_with_their_images(key: str, tiny: Tiny) -> None:
    view, screen = seen(tiny), SCREENS[key].model_validate({})
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    scores = screen.score(view)
    other = screen.score(replace(view, transfer=view.transfer.select(order)))
    close = torch.isclose(other.transfer, scores.transfer[order], rtol=1e-4, atol=1e-4)
    assert close.double().mean() >= (0.9 if key in JUMPY else 1)
    close = torch.isclose(other.clean, scores.clean, rtol=1e-4, atol=1e-4)
    assert close.double().mean() >= (0.9 if key in JUMPY else 1)


@pytest.mark.parametrize(
    ("key", "need"), [(key, need) for key, kind in SCREENS.items() for need in sorted(kind.needs)]
)
def test_what_a_screen_lacks_is_one_sentence(key: str, need: Any, tiny: Tiny) -> None:
    view = seen(tiny)
    bare = replace(view.transfer, labels=None)
    without = {
        "clean": {"clean": None},
        "labels": {"transfer": bare},
        "gradient": {"teacher": Deaf(tiny.teacher)},
    }.get(need, {need: None})
    with pytest.raises(ForeshotError, match=f"screen {key}: expected") as error:
        SCREENS[key].model_validate({}).score(replace(view, **without))
    assert WANTED[need] in str(error.value)


def test_without_anything_but_the_teacher_the_combined_screen_guesses(tiny: Tiny) -> None:
    view = seen(tiny)
    bare = replace(view, transfer=replace(view.transfer, labels=None), clean=None, second=None)
    verdict = judge(Combined(), bare)
    assert verdict.calibrated is False
    assert judge(Combined(), replace(view, student=None), 0.05).calibrated is True
    # A student compares what it has learned from with what it has not.
    assert judge(Combined(), view, 0.05).calibrated is False
    assert judge(Combined(), replace(view, both=True), 0.05).calibrated is True


def test_networks_are_asked_once_for_all_screens(tiny: Tiny) -> None:
    asked = 0

    def counted(*_: Any) -> None:
        nonlocal asked
        asked += 1

    view = seen(tiny)
    handle = view.teacher.register_forward_hook(counted)
    for key in ("label_disagreement", "mahalanobis", "lid", "second_teacher"):
        SCREENS[key].model_validate({}).score(view)
    handle.remove()
    # The transfer set, the calibration half, the reference half; one image for a gradient.
    assert asked == 4


def test_the_clean_halves_are_apart_and_fixed(tiny: Tiny) -> None:
    one, two = seen(tiny).pool, seen(tiny).pool
    assert one.calibration is not None
    assert two.calibration is not None
    assert one.calibration.digest == two.calibration.digest
    rows = {bytes(x.numpy().tobytes()) for x in (*one.calibration.images, *one.reference.images)}
    assert len(rows) == 80


@pytest.mark.parametrize("count", [0, 1])
def test_a_clean_set_that_cannot_be_halved_is_refused(count: int, tiny: Tiny) -> None:
    view = replace(seen(tiny), clean=stripes(5, 5).select(torch.arange(count)))
    with pytest.raises(ForeshotError, match="clean set: expected two images or more"):
        LocalDimension().score(view)


def test_too_few_neighbours_and_no_features_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ForeshotError, match="expected a clean set of 40 images or more"):
        LocalDimension().score(replace(seen(tiny), clean=stripes(30, 5)))
    flat = Rule(lambda x: x.flatten(1)[:, :4])
    with pytest.raises(ForeshotError, match="expected a network with a linear layer"):
        LabelDisagreement().score(replace(seen(tiny), teacher=flat))


# What must stay out of reach ---------------------------------------------------------------------

SECRETS = ("trigger", "target", "poison", "indices", "bases", "test", "students")


class Cheat(Screen):
    """A screen that reads what no defender has, and so must fail."""

    reads: str = "target"
    needs: ClassVar[frozenset[Any]] = frozenset()

    def suspicion(self, pool: Pool) -> Tensor:
        return getattr(pool.view, self.reads) + getattr(pool, self.reads)


@pytest.mark.parametrize("secret", SECRETS)
def test_a_screen_that_reaches_for_a_secret_fails(secret: str, tiny: Tiny) -> None:
    view = seen(tiny)
    with pytest.raises(AttributeError, match=secret):
        Cheat(reads=secret).score(view)
    assert not hasattr(view.pool, secret)
    with pytest.raises(FrozenInstanceError):
        setattr(view, secret, 1)
    with pytest.raises(TypeError, match=secret):
        replace(view, **{secret: 1})


def test_no_type_of_the_view_leads_to_a_secret() -> None:
    reached: set[Any] = set()
    todo = [get_type_hints(DefenderView)[field.name] for field in fields(DefenderView)]
    while todo:
        kind = todo.pop()
        if isinstance(kind, list):  # of a callable's arguments
            todo += kind
        elif kind not in reached:
            reached.add(kind)
            todo += get_args(kind)
            if getattr(kind, "__module__", "").startswith("foreshot"):
                todo += get_type_hints(kind).values()
    found = {kind for kind in reached if isinstance(kind, type)}
    assert nn.Module in found
    assert not any(issubclass(kind, Trigger | Poison | AttackerView) for kind in found)
    known = {field.name for field in fields(DefenderView)}
    assert not known & set(SECRETS)
