"""Each screen against its formula, written out independently, and on poison that it should find."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dct
from scipy.ndimage import median_filter
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn

from conftest import Deaf, Rule, Tiny, stripes, trained
from foreshot import adversarial
from foreshot.attacks import Pgd
from foreshot.compute import CPU
from foreshot.data import ImageSet, Signs
from foreshot.defences import Combined, Screen, judge
from foreshot.defences.combined import DEFAULT
from foreshot.defences.pool import Pool, Reading
from foreshot.defences.scoring import found
from foreshot.defences.screens import (
    ActivationClustering,
    Beatrix,
    Detector,
    Frequency,
    LabelDisagreement,
    LocalDimension,
    Mahalanobis,
    NearDuplicate,
    ScaleUp,
    Scan,
    SecondTeacher,
    SpectralSignature,
    Spectre,
    Strip,
    TeacherConsistency,
)
from foreshot.defences.screens.consistency import Change
from foreshot.defences.screens.frequency import spectrum
from foreshot.defences.screens.halves import halves
from foreshot.errors import ForeshotError
from foreshot.inference import pixels
from foreshot.models import ResNet, build
from foreshot.poison import Poison
from foreshot.training import Samples, Supervised, Training, fit
from foreshot.triggers import Dot
from foreshot.views import AttackerView, DefenderView


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(count: int, side: int = 8, channels: int = 3, seed: int = 0) -> ImageSet:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, channels, side, side), generator=random)
    return ImageSet(images.to(torch.uint8), None, ("a", "b", "c"))


class Net(nn.Module):
    """Three logits, linear in the pixels."""

    def __init__(self, seed: int, pixels: int = 192) -> None:
        super().__init__()
        self.last = nn.Linear(pixels, 3)
        self.last.weight.data = 0.3 * normal(3, pixels, seed=seed).float()
        self.last.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.flatten(1))


def looking(count: int = 30, clean: int = 60, **parts: nn.Module) -> DefenderView:
    transfer = noise(count)
    networks: dict[str, Any] = {"teacher": Net(0), "student": Net(1), "second": Net(2)} | parts
    return DefenderView(
        transfer=transfer, clean=noise(clean, seed=9), seed=0, compute=CPU, **networks
    )


def planted(
    features: Tensor, said: Tensor, known: Tensor | None = None, classes: Tensor | None = None
) -> Pool:
    """A pool whose networks see the given features and give the given answers."""
    width = int(said.max()) + 1
    view = looking(len(features))
    pool = Pool(DefenderView(view.transfer, Net(0), Net(1), None, 0, CPU))
    reading = Reading(features.float(), torch.eye(width)[said])
    pool.teacher = pool.student = reading
    if known is not None and classes is not None:
        pool.teacher_on_reference = pool.student_on_reference = Reading(
            known.float(), torch.eye(width)[classes]
        )
    return pool


def auroc(scores: Tensor, indices: Tensor) -> float:
    stored = torch.zeros(len(indices), 1, 1, 1, dtype=torch.uint8)
    return found(scores, Poison(indices, stored))["auroc"]


def array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().numpy()


# Of single images --------------------------------------------------------------------------------


def behind(logits: NDArray[np.float64], own: int) -> float:
    return max(z for i, z in enumerate(logits) if i != own) - logits[own]


@pytest.mark.parametrize("change", ["jpeg", "median", "depth", "shift"])
def test_consistency_is_how_far_the_answer_falls_behind(change: Change) -> None:
    view = looking()
    screen = TeacherConsistency(changes=(change,), quality=60, bits=3, pixels=2)
    scores = screen.score(view).transfer
    weight = array(view.teacher.get_parameter("last.weight"))
    for image, score in zip(view.transfer.images.numpy(), scores, strict=True):
        picture = np.moveaxis(image, 0, 2)
        if change == "jpeg":
            stored = io.BytesIO()
            Image.fromarray(picture).save(stored, "JPEG", quality=60)
            after = np.moveaxis(np.array(Image.open(stored)), 2, 0) / 255
        elif change == "median":
            after = np.stack([median_filter(c, 3, mode="mirror") for c in image]) / 255
        elif change == "depth":
            after = np.round(image / 255 * 7) / 7
        else:
            after = np.pad(image, ((0, 0), (2, 0), (2, 0)), mode="edge")[:, :8, :8] / 255
        plain, moved = weight @ (image / 255).ravel(), weight @ after.ravel()
        own = int(plain.argmax())
        assert float(score) == pytest.approx(behind(moved, own) - behind(plain, own), abs=1e-4)


def test_consistency_is_the_mean_over_its_changes() -> None:
    view = looking()
    kinds: tuple[Change, ...] = ("blur", "noise", "jpeg")
    each = [TeacherConsistency(changes=(kind,)).score(view).transfer for kind in kinds]
    whole = TeacherConsistency(changes=kinds).score(view).transfer
    torch.testing.assert_close(whole, torch.stack(each).mean(0))


def test_a_second_teacher_and_labels_are_compared_by_margins() -> None:
    view = looking()
    first, second = (
        array(net.get_parameter("last.weight"))
        @ (view.transfer.images.numpy() / 255).reshape(30, -1).T
        for net in (view.teacher, view.second or view.teacher)
    )
    labels = torch.arange(30) % 3
    labelled = ImageSet(view.transfer.images, labels, view.transfer.classes)
    told = DefenderView(labelled, view.teacher, None, None, 0, CPU)
    by_label, by_second = LabelDisagreement().score(told), SecondTeacher().score(view)
    assert len(by_label.clean) == 0
    for i in range(30):
        own = int(first[:, i].argmax())
        expected = behind(second[:, i], own) - behind(first[:, i], own)
        assert float(by_second.transfer[i]) == pytest.approx(expected, abs=1e-4)
        assert float(by_label.transfer[i]) == pytest.approx(behind(first[:, i], i % 3), abs=1e-4)


def test_the_spectrum_is_that_of_the_cosine_matrix_and_noise_stands_out() -> None:
    x = noise(3).images / 255
    matrix = np.asarray(dct(np.eye(8), axis=0, norm="ortho"))
    expected = np.log(((matrix @ array(x) @ matrix.T) ** 2).mean(1) + 1e-6).reshape(3, -1)
    np.testing.assert_allclose(spectrum(x).numpy(), expected, atol=2e-3)
    smooth = smoothed(300)
    signs = 2 * torch.randint(2, (20, 3, 16, 16), generator=torch.Generator().manual_seed(3)) - 1
    indices = torch.arange(20)
    noisy = (smooth.images[:20].short() + 8 * signs).clamp(0, 255).to(torch.uint8)
    view = DefenderView(
        smooth.replaced(indices, noisy), Net(0, 768), None, smoothed(200, 5), 0, CPU
    )
    assert auroc(Frequency().score(view).transfer, indices) > 0.99


def smoothed(count: int, seed: int = 0) -> ImageSet:
    """Images without high frequencies, but for a little noise."""
    rough = nn.functional.interpolate(
        noise(count, 4, seed=seed).images.float(), (16, 16), mode="bicubic"
    )
    rough += 2 * normal(*rough.shape, seed=seed + 1)
    return ImageSet(rough.round().clamp(0, 255).to(torch.uint8), None, ("a", "b", "c"))


@pytest.mark.parametrize("shared", [True, False])
def test_a_small_pattern_in_many_images_of_one_answer_stands_out(shared: bool) -> None:
    """And not one that all answers share."""
    transfer = smoothed(240)
    said = torch.arange(240) % 3
    indices = torch.arange(0, 60, 3) if shared else torch.arange(20)
    images = transfer.images[indices].clone()
    images[:, :, 2:5, 11:14] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    transfer = transfer.replaced(indices, images)
    pool = Pool(DefenderView(transfer, Net(0, 768), None, None, 0, CPU))
    pool.teacher = Reading(torch.zeros(240, 1), torch.eye(3)[said])
    scores = NearDuplicate().suspicion(pool)
    assert (auroc(scores, indices) > 0.99) is shared
    # One image by the definition, window by window.
    mine, images = int(indices[1]), array(transfer.images)
    best = -math.inf
    for top in range(14):
        for left in range(14):
            window = images[:, :, top : top + 3, left : left + 3].reshape(240, -1)
            like = np.exp(-((window - window[mine]) ** 2).mean(1) / (2 * 8**2))
            same = array(said == said[mine]).astype(bool)
            inside = (like[same].sum() - 1) / (same.sum() - 1)
            best = max(best, math.log((inside + 1 / 400) / (like[~same].mean() + 1 / 400)))
    scores = NearDuplicate(compared=400).suspicion(pool)
    assert float(scores[mine]) == pytest.approx(best, abs=1e-3)


def test_a_pattern_larger_than_the_images_is_refused(tiny: Tiny) -> None:
    pool = Pool(DefenderView(tiny.train, tiny.teacher, None, None, 0, CPU))
    with pytest.raises(ForeshotError, match="at most the images' 12 pixels, found 13"):
        NearDuplicate(size=13).suspicion(pool)


# Of features -------------------------------------------------------------------------------------


def test_local_dimension_is_its_estimator_and_finds_the_dimension() -> None:
    known, points = normal(300, 6), normal(40, 6, seed=1)
    scores = LocalDimension(neighbours=15).suspicion(
        planted(points, torch.arange(40) % 2, known, torch.arange(300) % 2)
    )
    for point, score in zip(array(points.float()), scores, strict=True):
        near = np.sort(np.linalg.norm(array(known.float()) - point, axis=1))[:15]
        assert float(score) == pytest.approx(-1 / np.mean(np.log(near / near[-1])), rel=1e-4)
    flat, full = torch.zeros(2000, 6, dtype=torch.float64), normal(2000, 6, seed=3)
    flat[:, :2] = normal(2000, 2, seed=4)
    medians = [
        float(
            LocalDimension(neighbours=50)
            .suspicion(
                planted(cloud[:100], torch.zeros(100).long(), cloud[100:], torch.zeros(1900).long())
            )
            .median()
        )
        for cloud in (flat, full)
    ]
    assert medians == [pytest.approx(2, abs=0.3), pytest.approx(6, abs=1.5)]


def test_mahalanobis_is_that_of_scipy_to_the_nearest_class() -> None:
    classes, said = torch.arange(90) % 3, torch.arange(20) % 3
    mixing = normal(5, 5, seed=7)
    known = (normal(90, 5) @ mixing + 4 * normal(3, 5, seed=8)[classes]).float()
    points = normal(20, 5, seed=9).float() * 3
    scores = Mahalanobis().suspicion(planted(points, said, known, classes))
    means = np.stack([array(known)[classes == c].mean(0) for c in range(3)])
    covariance, _ = ledoit_wolf(array(known) - means[classes], assume_centered=True)
    precision = np.linalg.inv(covariance)
    expected = [min(mahalanobis(p, m, precision) ** 2 for m in means) for p in array(points)]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)


def mixed(poisoned: int = 15, clean: int = 85, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Four classes, the second with a subgroup: features, answers, who is in the subgroup."""
    said = torch.cat([torch.full((clean,), c) for c in range(4)] + [torch.ones(poisoned).long()])
    features = normal(len(said), width) + 6 * normal(4, width, seed=1)[said]
    features[-poisoned:, 2] += 6
    return features, said, torch.arange(len(said) - poisoned, len(said))


def test_spectral_signature_is_numpys_singular_vector() -> None:
    features, said, odd = mixed()
    scores = SpectralSignature().suspicion(planted(features, said))
    for c in range(4):
        group = array(features[said == c].float())
        centred = group - group.mean(0)
        _, _, axes = np.linalg.svd(centred)
        np.testing.assert_allclose(
            scores[said == c], (centred @ axes[0]) ** 2, rtol=1e-4, atol=1e-4
        )
    assert auroc(scores, odd) > 0.98


@pytest.mark.parametrize("screen", [ActivationClustering(), Scan(), Spectre(components=8)])
def test_a_subgroup_of_one_class_stands_out(screen: Screen) -> None:
    features, said, odd = mixed()
    known, classes = normal(200, 8, seed=5), torch.arange(200) % 4
    known = known + 6 * normal(4, 8, seed=1)[classes]
    scores = screen.suspicion(planted(features, said, known, classes))
    assert auroc(scores, odd) > 0.97
    nothing = torch.arange(len(said) - len(odd))  # the same without the subgroup
    calm = screen.suspicion(planted(features[nothing], said[nothing], known, classes))
    assert calm.quantile(0.97) < scores[odd].median()


def test_scan_knows_the_odd_group_by_the_reference_even_if_it_is_the_larger() -> None:
    features, said, odd = mixed(poisoned=120, clean=60)
    known, classes = normal(200, 8, seed=5), torch.arange(200) % 4
    known = known + 6 * normal(4, 8, seed=1)[classes]
    assert auroc(Scan().suspicion(planted(features, said, known, classes)), odd) > 0.98
    assert auroc(ActivationClustering().suspicion(planted(features, said)), odd) < 0.9


def test_scan_is_the_likelihood_ratio_over_the_median_class() -> None:
    features, said, _ = mixed()
    known, classes = normal(400, 8, seed=5), torch.arange(400) % 4
    known = (known + 6 * normal(4, 8, seed=1)[classes]).float()
    pool = planted(features, said, known, classes)
    scores = Scan().suspicion(pool)
    left = array(known) - np.stack([array(known)[classes == c].mean(0) for c in range(4)])[classes]
    precision = np.linalg.inv(ledoit_wolf(left, assume_centered=True)[0])

    def spread(points: NDArray[np.float64]) -> float:
        d = points - points.mean(0)
        return float(np.einsum("ni,ij,nj->", d, precision, d))

    indices = []
    for c in range(4):
        group = features[said == c].float()
        odd = halves(group.double() @ torch.from_numpy(np.linalg.cholesky(precision))).numpy()
        whole, one, other = array(group), array(group)[odd], array(group)[~odd]
        indices.append((spread(whole) - spread(one) - spread(other) - 8) / 4)
    middle = np.sort(indices)[1]  # torch's median of four
    deviation = 1.4826 * np.sort(np.abs(np.array(indices) - middle))[1]
    # A member who is surely of the odd group has the index itself for a score.
    assert float(scores[-15:].max()) == pytest.approx((indices[1] - middle) / deviation, rel=1e-3)
    assert scores[said != 1].max() < scores[-15:].min()


def test_spectre_sees_what_spectral_signature_cannot() -> None:
    """A subgroup along a direction of little variance, which whitening shows."""
    count, poisoned = 400, 30
    features = normal(count, 6) * torch.tensor([30.0, 20, 10, 5, 1, 0.1], dtype=torch.float64)
    features[:poisoned, 5] += 0.8
    pool = planted(features, torch.zeros(count).long())
    odd = torch.arange(poisoned)
    assert auroc(Spectre(components=6).suspicion(pool), odd) > 0.99
    assert auroc(SpectralSignature().suspicion(pool), odd) < 0.7


@pytest.mark.parametrize("scale", [0.0, 1e-9])
def test_spectre_has_a_score_for_images_that_are_all_alike(scale: float) -> None:
    features = torch.ones(60, 4, dtype=torch.float64) + scale * normal(60, 4)
    assert Spectre(components=4).within(features).isfinite().all()


def test_spectre_with_alpha_zero_is_the_mean_square_of_the_whitened() -> None:
    features = normal(200, 4) @ normal(4, 4, seed=1)
    scores = Spectre(components=4, trimmed=0, alpha=0).within(features)
    centred = array(features - features.mean(0))
    precision = np.linalg.inv(np.cov(centred.T))
    expected = np.einsum("ni,ij,nj->n", centred, precision, centred) / 4
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_beatrix_is_its_loop_over_pairs_of_features() -> None:
    known, classes = normal(40, 4).abs().float(), torch.arange(40) % 2
    points, said = normal(9, 4, seed=1).abs().float(), torch.tensor([0, 1, 2] * 3)
    known[:, 3] = 0  # a feature that is silent on clean images says nothing
    scores = Beatrix().suspicion(planted(points, said, known, classes))
    usual = np.einsum("ni,nj->nij", array(known), array(known))
    expected = np.zeros(9)
    for i in range(4):
        for j in range(i, 4):
            # torch's median of an even number is the lower of the two in the middle
            middle = [np.sort(usual[classes == c, i, j])[9] for c in range(2)]
            middle.append(np.sort(usual[:, i, j])[19])
            scale = np.abs(usual[:, i, j] - np.array(middle)[classes]).mean()
            if scale:
                now = array(points)[:, i] * array(points)[:, j]
                expected += np.abs(now - np.array(middle)[said]) / scale / 10
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


# Of a student's inputs ---------------------------------------------------------------------------


def test_strip_is_minus_the_mean_entropy_under_reference_images() -> None:
    view = looking()
    scores = Strip(overlays=5).score(view).transfer
    assert view.student is not None
    weight = array(view.student.get_parameter("last.weight"))
    overlays = view.pool.reference.images[:5].numpy() / 255
    for image, score in zip(view.transfer.images.numpy() / 255, scores, strict=True):
        entropies = []
        for overlay in overlays:
            z = weight @ np.minimum(image + overlay, 1).ravel()
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            entropies.append(-(p * np.log2(p + 1e-300)).sum())
        assert float(score) == pytest.approx(-np.mean(entropies), abs=1e-4)


def test_scale_up_is_the_share_of_brighter_images_with_the_same_answer() -> None:
    # Dark images are called 0, middling ones 1, bright ones 2.
    rule = Rule(lambda x: -(x.mean((1, 2, 3))[:, None] - torch.tensor([0.1, 0.5, 0.9])).abs())
    levels = torch.tensor([2, 4, 20, 60, 100, 200])
    images = levels[:, None, None, None].expand(6, 3, 8, 8).to(torch.uint8)
    pool = Pool(DefenderView(ImageSet(images, None, ("a", "b", "c")), Net(0), rule, None, 0, CPU))
    pool.student = Reading(torch.zeros(6, 1), rule(images / 255))
    scores = ScaleUp(factors=(2, 5, 10, 20)).suspicion(pool)
    bright = (levels[:, None] * torch.tensor([1, 2, 5, 10, 20]) / 255).clamp(max=1)
    called = (bright >= 0.3).long() + (bright >= 0.7).long()
    assert scores.tolist() == (called[:, 1:] == called[:, :1]).double().mean(1).tolist()
    assert 0 < scores.mean() < 1


# On poison ---------------------------------------------------------------------------------------


def test_the_default_screens_find_pgd_poison(tiny: Tiny) -> None:
    view = AttackerView(tiny.train.images, tiny.teacher, tiny.trigger, tiny.target, 0, CPU)
    poison = Pgd(count=20, epsilon=30, steps=20, retries=1).craft(view)
    seen = DefenderView(
        poison.apply(tiny.train),
        tiny.teacher,
        None,
        stripes(400, 5),
        0,
        CPU,
        second=trained(tiny.train, 1),
    )
    for screen in (TeacherConsistency(), SecondTeacher(), LabelDisagreement(), Frequency()):
        assert found(screen.score(seen).transfer, poison)["auroc"] >= 0.95, screen.name
    verdict = judge(SecondTeacher(), seen)
    assert verdict.target == tiny.target
    assert set(poison.indices.tolist()) & set(verdict.flagged.tolist())


def test_a_detector_learns_of_the_reference_alone_and_gives_its_log_odds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adversarial, "EXAMPLES", 64)
    view = replace(looking(clean=20), seed=5)
    scores = Detector(level=8, epochs=2).score(view)
    pool = view.pool
    network = adversarial.detector(
        view.teacher, pool.reference.images, CPU, seed=5, stage="detector", level=8, epochs=2
    )
    assert pool.calibration is not None
    for found_, images in ((scores.transfer, view.transfer), (scores.clean, pool.calibration)):
        assert torch.allclose(found_, network(pixels(images.images)).double(), atol=1e-5)
    assert scores.transfer.std() > 0


def test_combined_does_without_a_gradient_of_the_teacher() -> None:
    view = looking(clean=60, teacher=Deaf(Net(0)))
    without = [screen for screen in DEFAULT if not isinstance(screen, Detector)]
    expected = Combined(screens=tuple(without)).score(view)
    assert torch.equal(Combined().score(view).transfer, expected.transfer)


@pytest.mark.slow
def test_consistency_finds_pgd_poison_of_a_brittle_teacher_of_colour_signs(tmp_path: Path) -> None:
    train = Signs(train=4500, test=10).load(tmp_path).train
    transfer, clean = train.select(torch.arange(3500)), train.select(torch.arange(3500, 4500))
    assert train.labels is not None
    teacher = build(ResNet(depth=8, stem_stride=2), train.images, 43, 0, "teacher")
    samples = Samples(train.images, {"y": train.labels})
    fit(Supervised(teacher), samples, Training(epochs=8), CPU, seed=0, stage="teacher")
    attacker = AttackerView(transfer.images, teacher, Dot(), 40, 0, CPU)
    poison = Pgd(rate=0.05, epsilon=16, steps=20).craft(attacker)
    unlabelled = ImageSet(poison.apply(transfer).images, None, train.classes)
    view = DefenderView(unlabelled, teacher, None, clean, 0, CPU)
    screens = TeacherConsistency(), Frequency(), Detector(), NearDuplicate(), Combined()
    for screen in screens:
        figures = found(screen.score(view).transfer, poison)
        assert figures["auroc"] > 0.95, (screen.name, figures)
    verdict = judge(Combined(), view)
    assert verdict.target == 40
    guilty = torch.isin(verdict.flagged, poison.indices)
    assert guilty.double().mean() > 0.85
    assert guilty.sum() > 0.9 * len(poison)
