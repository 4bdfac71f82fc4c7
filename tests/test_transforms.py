"""What an image goes through: against formulas and Pillow, with the gradient it should have."""

import io
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import median_filter, shift
from torch import Tensor

from foreshot.augment import augment
from foreshot.seeding import generator
from foreshot.transforms import Transform, jpeg, transform

KINDS: tuple[Transform, ...] = get_args(Transform)


def some(channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand((4, channels, 16, 12), generator=generator(0, "images"), dtype=dtype)


def drawn(x: Tensor, kind: Transform, key: int = 0) -> Tensor:
    return transform(x, kind, generator(key, "transform"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_decides_alone_and_images_stay_images(kind: Transform, channels: int) -> None:
    x = some(channels)
    for key in range(5):
        one, other = drawn(x, kind, key), drawn(x, kind, key)
        assert torch.equal(one, other)
        assert (one.shape, one.dtype) == (x.shape, x.dtype)
        assert one.min() >= -1e-6
        assert one.max() <= 1 + 1e-6
        torch.testing.assert_close(drawn(x[1:2], kind, key), one[1:2])
    different = any(not torch.allclose(drawn(x, kind, key), x) for key in range(5))
    assert different == (kind != "none")


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (20, 1)])
def test_what_is_one_pixel_wide_is_not_reflected(shape: tuple[int, int]) -> None:
    x = torch.rand((3, 1, *shape), generator=generator(0, "images"))
    assert drawn(x, "crop_flip").shape == x.shape
    images = (x * 255).to(torch.uint8)
    assert augment(images, "crop_flip", generator(0, "augment")).shape == images.shape


def test_a_crop_is_a_window_of_the_reflected_images() -> None:
    x, seen = some(), set()
    padded = F.pad(x, (1, 1, 2, 2), "reflect")
    for key in range(120):
        found = drawn(x, "crop_flip", key)
        places = [
            (top, left, flip)
            for top in range(5)
            for left in range(3)
            for flip in (False, True)
            for window in [padded[:, :, top : top + 16, left : left + 12]]
            if torch.equal(found, window.flip(3) if flip else window)
        ]
        seen |= set(places)
        assert places
    assert len(seen) > 25  # of 30


def test_jpeg_is_pillows_and_its_gradient_that_of_the_image() -> None:
    x = (some() * 255).round().div(255).requires_grad_()
    found = drawn(x, "jpeg")
    quality = int(torch.randint(50, 91, (), generator=generator(0, "transform")))
    for image, after in zip(x.detach(), found.detach(), strict=True):
        levels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        stored = io.BytesIO()
        Image.fromarray(levels).save(stored, "JPEG", quality=quality)
        expected = torch.from_numpy(np.array(Image.open(stored))).permute(2, 0, 1) / 255
        torch.testing.assert_close(after, expected)
    weights = some()
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    torch.testing.assert_close(gradient, weights)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_of_other_numbers_of_channels_each_is_a_grey_jpeg(channels: int) -> None:
    x = torch.rand((3, channels, 12, 9), generator=generator(0, "x"))
    expected = torch.cat([jpeg(x[:, [channel]], 70) for channel in range(channels)], 1)
    assert torch.equal(jpeg(x, 70), expected)
    picture, stored = (x[0, 0] * 255).round().to(torch.uint8).numpy(), io.BytesIO()
    Image.fromarray(picture).save(stored, "JPEG", quality=70)
    again = torch.from_numpy(np.array(Image.open(stored))) / 255
    torch.testing.assert_close(jpeg(x, 70)[0, 0], again)


def test_depth_leaves_few_levels() -> None:
    counts = {len(drawn(some(), "depth", key).unique()) for key in range(20)}
    assert counts == {8, 16, 32}


def test_a_shift_is_scipys_by_each_step_of_a_pixel() -> None:
    x, seen = some(), set()
    moves = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)]
    for key in range(80):
        found = drawn(x, "shift", key).numpy()
        at = [
            move
            for move in moves
            if np.array_equal(shift(x.numpy(), (0, 0, *move), order=0, mode="nearest"), found)
        ]
        assert len(at) == 1
        seen |= set(at)
    assert seen == set(moves)


def test_the_median_is_scipys() -> None:
    x = some()
    expected = median_filter(x.numpy(), size=(1, 1, 3, 3), mode="mirror")
    np.testing.assert_array_equal(drawn(x, "median").numpy(), expected)


def test_noise_is_the_same_for_each_image_and_up_to_eight_levels() -> None:
    x = torch.full((3, 3, 64, 64), 0.5)
    sigmas = []
    for key in range(30):
        change = drawn(x, "noise", key) - x
        assert torch.equal(change[0], change[1])
        sigmas.append(float(change[0].std() * 255))
    assert max(sigmas) < 8.3
    assert min(sigmas) < 1
    assert max(sigmas) > 6


@pytest.mark.parametrize("kind", ["blur", "resize"])
def test_smoothing_is_linear_keeps_what_is_flat_and_takes_from_what_is_not(kind: Transform) -> None:
    x, other = some(dtype=torch.float64), some(dtype=torch.float64).flip(0)
    torch.testing.assert_close(
        drawn(0.3 * x + 0.7 * other, kind), 0.3 * drawn(x, kind) + 0.7 * drawn(other, kind)
    )
    flat = torch.full_like(x, 0.4)
    torch.testing.assert_close(drawn(flat, kind), flat)
    assert drawn(x, kind).var() < 0.9 * x.var()


def test_blur_is_the_gaussian_of_its_formula() -> None:
    x = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    x[0, 0, 7, 7] = 1
    sigma = 0.3 + 0.7 * float(torch.rand((), generator=generator(0, "transform")))
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    found = drawn(x, "blur")[0, 0, 4:11, 4:11].numpy()
    np.testing.assert_allclose(found, np.outer(weights, weights), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["crop", "crop_flip", "shift", "blur", "median", "resize"])
def test_gradients_pass(kind: Transform) -> None:
    x = some(1, torch.float64)[:1, :, :10, :10].requires_grad_()
    assert torch.autograd.gradcheck(lambda image: drawn(image, kind), (x,))
