"""The evaluator counts what it says that it counts."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import CLASSES, Rule, Tiny
from foreshot import metrics
from foreshot.attacks import Noise, TriggerOnly, craft
from foreshot.compute import CPU
from foreshot.data import ImageSet
from foreshot.errors import ForeshotError
from foreshot.inference import logits
from foreshot.metrics import evaluate, psnr, rate, ssim, stealth, wilson
from foreshot.models.checkpoint import state_digest
from foreshot.poison import Poison
from foreshot.triggers import Patch
from foreshot.triggers.base import stamp_uint8

WHITE = Patch(size=2, margin=0)


@given(total=st.integers(1, 5000), share=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_wilson_is_scipys(total: int, share: float) -> None:
    from scipy.stats import binomtest

    hits = round(share * total)
    expected = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    assert wilson(hits, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_a_rate_is_hits_over_total(hits: list[bool]) -> None:
    found = rate(torch.tensor(hits))
    assert (found["hits"], found["total"]) == (sum(hits), len(hits))
    assert found["value"] == sum(hits) / len(hits)
    low, value, high = (float(found[key] or 0) for key in ("low", "value", "high"))
    assert 0 <= low <= value <= high <= 1


def constant(number: int) -> Rule:
    return Rule(lambda x: torch.eye(4)[number].expand(len(x), 4))


def backdoored() -> Rule:
    """Knows the class by the level of the first pixel; calls it 1 if the last pixel is white."""

    def say(x: Tensor) -> Tensor:
        known = torch.eye(4)[(x[:, 0, 0, 0] * 255).round().long()]
        return known + 9 * (x[:, 0, -1:, -1] >= 1) * torch.eye(4)[1]

    return Rule(say)


def labelled(counts: tuple[int, ...] = (5, 7, 9, 0)) -> ImageSet:
    labels = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
    images = labels.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 6, 6).clone()
    return ImageSet(images, labels, CLASSES)


def test_images_of_the_target_class_are_no_success() -> None:
    found = evaluate(constant(1), labelled(), WHITE, target=1)
    assert (found["asr"]["hits"], found["asr"]["total"], found["asr"]["value"]) == (14, 14, 1.0)
    assert (found["clean_accuracy"]["hits"], found["clean_accuracy"]["total"]) == (7, 21)
    assert (found["robust_accuracy"]["hits"], found["robust_accuracy"]["total"]) == (0, 14)


def test_a_backdoor_shows_only_on_stamped_images() -> None:
    found = evaluate(backdoored(), labelled(), WHITE, target=1)
    assert found["clean_accuracy"]["value"] == 1
    assert found["asr"]["value"] == 1
    assert found["robust_accuracy"]["value"] == 0
    harmless = evaluate(backdoored(), labelled(), Patch(size=2, colour=(0, 0, 0)), target=1)
    assert harmless["asr"]["value"] == 0
    assert harmless["robust_accuracy"]["value"] == 1
    other = evaluate(backdoored(), labelled(), WHITE, target=0)
    assert other["asr"]["value"] == 0
    assert (other["robust_accuracy"]["hits"], other["robust_accuracy"]["total"]) == (7, 16)


def test_classes_sum_to_the_whole(tiny: Tiny) -> None:
    found = evaluate(tiny.teacher, tiny.test, Patch(size=6), target=2)
    assert set(found["per_class"]) == set(CLASSES)
    for key in ("clean_accuracy", "asr", "robust_accuracy"):
        parts = [rates[key] for rates in found["per_class"].values() if key in rates]
        assert sum(part["hits"] for part in parts) == found[key]["hits"]
        assert sum(part["total"] for part in parts) == found[key]["total"]
    assert set(found["per_class"]["diagonal"]) == {"clean_accuracy"}
    assert found["asr"]["total"] == found["robust_accuracy"]["total"] == 150


def test_a_class_without_images_is_left_out_and_per_class_is_by_true_class() -> None:
    found = evaluate(backdoored(), labelled((5, 7, 9, 0)), WHITE, target=1)["per_class"]
    assert list(found) == ["horizontal", "vertical", "diagonal"]
    assert found["diagonal"]["asr"]["total"] == 9


def test_classes_of_one_name_stay_apart() -> None:
    data = replace(labelled(), classes=("a", "b", "a", "c"))
    found = evaluate(backdoored(), data, WHITE, 1)
    assert list(found["per_class"]) == ["a (0)", "b", "a (2)"]
    assert sum(rates["clean_accuracy"]["total"] for rates in found["per_class"].values()) == 21


def test_evaluation_is_of_the_stored_eight_bits_and_restores_the_mode(tiny: Tiny) -> None:
    seen: list[Tensor] = []
    model = Rule(lambda x: (seen.append(x), torch.zeros(len(x), 4))[1])
    model.train()
    evaluate(model, tiny.test, Patch(colour=(100, 100, 100)), target=1)
    assert model.training
    for x in seen:
        levels = x * 255
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert torch.equal(torch.cat(seen[:1]), tiny.test.images / 255)


def test_only_images_of_the_target_class_leave_no_rate_but_valid_json() -> None:
    import json

    found = evaluate(constant(1), labelled((0, 3, 0, 0)), WHITE, target=1)
    assert found["asr"]["total"] == 0
    assert found["asr"]["value"] is None
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_evaluated_is_refused(tiny: Tiny) -> None:
    blind = ImageSet(tiny.test.images, None, CLASSES)
    with pytest.raises(ForeshotError, match=r"^test set: expected labels .*, found none$"):
        evaluate(tiny.teacher, blind, WHITE, 0)
    for target in (-1, 4):
        with pytest.raises(ForeshotError, match=f"^target: expected 0 to 3, found {target}$"):
            evaluate(tiny.teacher, tiny.test, WHITE, target)


def test_logits_are_those_of_eval_mode(tiny: Tiny) -> None:
    model = deepcopy(tiny.teacher).train()
    before = state_digest(model)
    assert torch.equal(
        logits(model, tiny.test.images, CPU), logits(tiny.teacher, tiny.test.images, CPU)
    )
    assert state_digest(model) == before
    assert all(module.training for module in model.modules())


def test_logits_do_not_depend_on_the_batch(tiny: Tiny) -> None:
    whole = logits(tiny.teacher, tiny.test.images, CPU)
    parts = logits(tiny.teacher, tiny.test.images, CPU, batch=7)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
    assert not whole.requires_grad


# Stealth -----------------------------------------------------------------------------------------


def noise(count: int, side: int = 12, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), generator=random).to(torch.uint8)


def test_psnr_is_the_formula() -> None:
    one, two = noise(4, seed=0), noise(4, seed=1)
    for a, b, found in zip(one, two, psnr(one, two).tolist(), strict=True):
        error = sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(),
                                                  strict=True)) / a.numel()  # fmt: skip
        assert found == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)
    # 0 and 255 are 255 apart, not one, as they would be if 8-bit numbers wrapped around.
    black = torch.zeros((1, 1, 8, 8), dtype=torch.uint8)
    assert psnr(black, black + 255).item() == pytest.approx(0, abs=1e-5)
    assert psnr(one, one).tolist() == [100.0] * 4


def ssim_by_hand(one: Tensor, two: Tensor) -> float:
    """Wang et al. (2004) with a Gaussian window of 11, sigma 1.5, and reflected borders."""
    from scipy.ndimage import correlate1d

    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (window / window.sum()).numpy()

    def blur(image):
        return correlate1d(correlate1d(image, window, 0, mode="mirror"), window, 1, mode="mirror")

    total = 0.0
    for a, b in zip(one.double().numpy() / 255, two.double().numpy() / 255, strict=True):
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        both = blur(a * b) - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
        total += (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()
    return total / len(one)


def test_ssim_is_the_formula() -> None:
    one = noise(3, side=16)
    two = (one.short() + (noise(3, side=16, seed=5) // 8).short()).clamp(0, 255).to(torch.uint8)
    found = ssim(one, two)
    assert found.shape == (3,)
    for a, b, value in zip(one, two, found.tolist(), strict=True):
        assert value == pytest.approx(ssim_by_hand(a, b), abs=1e-4)
    torch.testing.assert_close(ssim(one, one), torch.ones(3))
    assert (ssim(one, noise(3, side=16, seed=9)) < 0.2).all()


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_each_image_is_measured_by_itself(
    measure: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = noise(5, side=9), noise(5, side=9, seed=5)
    whole = measure(one, two)
    monkeypatch.setattr(metrics, "BATCH", 2)
    torch.testing.assert_close(measure(one, two), whole)


@pytest.mark.parametrize("side", [1, 4, 5])
def test_tiny_images_have_a_similarity(side: int) -> None:
    one = noise(3, side=side)
    torch.testing.assert_close(ssim(one, one), torch.ones(3))
    assert (ssim(one, 255 - one) < 0.9).all()


class Reshaping(nn.Module):
    """Takes no empty batch, as some networks of other packages do not."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), 1, -1).sum(2).expand(-1, 3)


def test_of_no_images_a_network_says_nothing() -> None:
    assert logits(Reshaping(), torch.zeros((0, 1, 4, 4), dtype=torch.uint8), CPU).shape == (0, 3)
    only = ImageSet(noise(4, side=4), torch.full((4,), 2), ("a", "b", "c"))
    found = evaluate(Reshaping(), only, Patch(size=2), 2)
    assert (found["asr"]["total"], found["asr"]["value"]) == (0, None)


def test_stealth_measures_what_is_stored(tiny: Tiny) -> None:
    poison = craft(Noise(count=20, epsilon=9), tiny.train.images, tiny.teacher, tiny.trigger, 1)
    found = stealth(poison, tiny.train, tiny.trigger, 1, tiny.teacher, CPU)
    assert (found["count"], found["rate"], found["linf_255"]) == (20, 0.05, 9)
    original = tiny.train.images[poison.indices]
    assert found["psnr_db"] == pytest.approx(psnr(poison.images, original).mean().item())
    said = logits(tiny.teacher, poison.images, CPU)
    assert found["teacher_target_rate"]["hits"] == int((said.argmax(1) == 1).sum())
    assert found["teacher_target_rate"]["total"] == 20
    confidence = said.softmax(1)[:, 1].mean().item()
    assert found["teacher_target_confidence"] == pytest.approx(confidence)


def test_a_stamped_image_is_off_by_nothing_but_by_its_trigger_if_none_is_due(tiny: Tiny) -> None:
    poison = craft(TriggerOnly(count=5), tiny.train.images, tiny.teacher, tiny.trigger, 1)
    arguments = (poison, tiny.train, tiny.trigger, 1, tiny.teacher, CPU)
    assert stealth(*arguments)["linf_255"] == 0
    plain = stealth(*arguments, stamped=False)
    original = tiny.train.images[poison.indices]
    off = (stamp_uint8(tiny.trigger, original).short() - original.short()).abs().max()
    assert plain["linf_255"] == int(off) > 0
    assert plain["psnr_db"] == stealth(*arguments)["psnr_db"] < 100


def test_no_poison_has_no_figures(tiny: Tiny) -> None:
    import json

    none = Poison(torch.zeros(0, dtype=torch.int64), tiny.train.images[:0])
    found = stealth(none, tiny.train, tiny.trigger, 1, tiny.teacher, CPU)
    assert found["count"] == found["rate"] == 0
    assert found["psnr_db"] is None
    json.dumps(found, allow_nan=False)
