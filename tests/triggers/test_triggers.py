"""Triggers put the right values on the right pixels, and keep what every attack relies on."""

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.autograd import gradcheck

from foreshot.errors import ForeshotError
from foreshot.levels import to_uint8
from foreshot.seeding import generator
from foreshot.triggers import TRIGGERS, AnyTrigger, base
from foreshot.triggers.base import Overlay, Trigger, locate, paint, stamp_uint8
from foreshot.triggers.blend import Blend
from foreshot.triggers.dot import Dot
from foreshot.triggers.grid import Grid
from foreshot.triggers.learned import Learned
from foreshot.triggers.patch import Patch
from foreshot.triggers.sinusoid import Sinusoid
from foreshot.triggers.warp import Warp

ALL: list[Trigger] = [
    Patch(),
    Patch(pattern="checker", place="center", colour=(10, 200, 30)),
    Dot(),
    Dot(size=4, place="bottom_left", margin=0),
    Blend(),
    Blend(opacity=0.7, pattern="uniform", cell=3),
    Blend(opacity=1),
    Sinusoid(),
    Sinusoid(amplitude=127, frequency=2.5),
    Grid(),
    Warp(),
    Warp(strength=4, seed=1),
]
every = pytest.mark.parametrize("trigger", ALL, ids=repr)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_the_list_covers_the_family() -> None:
    learned = {kind for kind in TRIGGERS.values() if issubclass(kind, Learned)}
    assert {type(trigger) for trigger in ALL} == set(TRIGGERS.values()) - learned


@every
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_stamped_images_stay_images(trigger: Trigger, channels: int) -> None:
    x = noise(5, channels, 16, 20)
    x[0], x[1] = 0, 1
    before = x.clone()
    stamped = trigger.stamp(x)
    assert torch.equal(x, before)
    assert stamped.shape == x.shape
    assert stamped.dtype == x.dtype
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    assert (stamped - x).abs().amax((1, 2, 3))[2:].min() > 0.01
    assert trigger.stamp(x.double()).dtype == torch.float64


@every
def test_an_image_is_stamped_alike_in_any_batch(trigger: Trigger) -> None:
    x = noise(6, 3, 16, 16)
    whole = trigger.stamp(x)
    assert torch.equal(whole, torch.cat([trigger.stamp(part) for part in x.split([1, 3, 2])]))
    assert torch.equal(whole, trigger.stamp(x.contiguous(memory_format=torch.channels_last)))


@every
def test_a_set_is_stamped_in_parts(trigger: Trigger, monkeypatch: pytest.MonkeyPatch) -> None:
    images = to_uint8(noise(7, 3, 16, 16))
    whole = stamp_uint8(trigger, images)
    monkeypatch.setattr(base, "PART", 3)
    assert torch.equal(stamp_uint8(trigger, images), whole)
    assert stamp_uint8(trigger, images[:0]).shape == (0, 3, 16, 16)


@every
def test_half_precision_is_within_a_level(trigger: Trigger) -> None:
    x = noise(2, 3, 16, 16).to(torch.bfloat16)
    stamped = trigger.stamp(x)
    assert stamped.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits, so that half a unit in the last place of 1 is half a level.
    assert (stamped.float() - trigger.stamp(x.float())).abs().max() < 1.5 / 255


@settings(max_examples=60, deadline=None)
@given(
    trigger=st.sampled_from(ALL),
    seed=st.integers(0, 1000),
    epsilon=st.sampled_from([1e-3, 0.03, 0.5]),
    saturate=st.booleans(),
)
def test_stamping_is_non_expansive_and_monotone(
    trigger: Trigger, seed: int, epsilon: float, saturate: bool
) -> None:
    low = noise(2, 3, 16, 16, seed=seed)
    low = low.round() if saturate else low
    high = (low + epsilon * noise(2, 3, 16, 16, seed=seed + 1)).clamp(0, 1)
    change = trigger.stamp(high) - trigger.stamp(low)
    assert change.min() >= -1e-6
    assert change.max() <= (high - low).max() + 1e-6


@every
def test_gradients_are_those_of_the_stamp(trigger: Trigger) -> None:
    # Far enough from 0 and 1 that finite differences do not cross a clamp, or from its bounds.
    x = (0.3 + 0.4 * noise(2, 1, 7, 7)).double().requires_grad_()
    if isinstance(trigger, Sinusoid):
        trigger = Sinusoid(amplitude=60, frequency=3)
    assert gradcheck(trigger.stamp, (x,))


def test_saturated_sinusoid_has_no_gradient_where_the_clamp_cuts() -> None:
    x = torch.full((1, 1, 1, 24), 0.5, requires_grad=True)
    stamped = Sinusoid(amplitude=127, frequency=1).stamp(0.5 * x)
    stamped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, stamped > 0)


@every
def test_opaque_is_exactly_what_the_image_does_not_reach(trigger: Trigger) -> None:
    x = (0.2 + 0.6 * noise(1, 2, 8, 13)).double().requires_grad_()
    if isinstance(trigger, Sinusoid):
        trigger = trigger.model_copy(update={"amplitude": 40.0})  # no pixel of x saturates
    stamped = trigger.stamp(x)
    gradients = [torch.autograd.grad(pixel, x, retain_graph=True)[0] for pixel in stamped.flatten()]
    reached = torch.stack([gradient.any() for gradient in gradients])
    opaque = trigger.opaque((2, 8, 13))
    assert opaque.dtype == torch.bool
    assert torch.equal(opaque, ~reached.reshape(2, 8, 13))


def test_opaque_is_robust_to_near_misses() -> None:
    assert not Sinusoid(amplitude=127).opaque((3, 28, 28)).any()
    assert not Blend(opacity=0.9999999999).opaque((3, 8, 8)).any()
    assert not Warp(strength=10).opaque((3, 28, 28)).any()
    assert Blend(opacity=1).opaque((3, 8, 8)).all()


@every
def test_overlays_are_idempotent_and_exact_after_rounding(trigger: Trigger) -> None:
    images = to_uint8(noise(3, 3, 16, 16))
    once = stamp_uint8(trigger, images)
    opaque = trigger.opaque((3, 16, 16))
    assert torch.equal(once[0][opaque], once[1][opaque])
    if isinstance(trigger, Overlay):
        assert torch.equal(stamp_uint8(trigger, once), once)
        assert torch.equal(once[:, ~opaque], images[:, ~opaque])


@every
def test_portraits_show_the_trigger(trigger: Trigger) -> None:
    for channels in (1, 3):
        portrait = trigger.draw((channels, 20, 24))
        assert portrait.dtype == torch.uint8
        assert portrait.shape == (channels, 20, 24)
        assert len(portrait.unique()) > 1


@every
def test_members_survive_pickling_and_json(trigger: Trigger) -> None:
    copy = pickle.loads(pickle.dumps(trigger))
    assert copy == trigger
    x = noise(1, 3, 16, 16)
    assert torch.equal(copy.stamp(x), trigger.stamp(x))
    adapter: TypeAdapter[Any] = TypeAdapter(AnyTrigger)
    assert adapter.validate_json(trigger.model_dump_json()) == trigger


@every
def test_the_global_rng_plays_no_part(trigger: Trigger) -> None:
    x = noise(1, 3, 16, 16)
    torch.manual_seed(1)
    first, state = trigger.stamp(x), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(trigger.stamp(x), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("trigger", "shape", "message"),
    [
        (Patch(size=4, margin=1), (3, 32, 4), "trigger patch: .*at least 5 x 5.*found 32 x 4"),
        (Dot(size=9, margin=0), (3, 8, 32), "trigger dot: .*at least 9 x 9.*found 8 x 32"),
        (Grid(offset=8), (1, 8, 8), "trigger grid: .*at least 9 x 9.*found 8 x 8"),
        (Sinusoid(frequency=6), (1, 99, 12), "trigger sinusoid: .*wider than 12 .*found 12"),
        (Warp(grid=4), (1, 3, 8), "trigger warp: .*at least 4 x 4.*found 3 x 8"),
    ],
    ids=str,
)
def test_triggers_that_do_not_fit_say_so(
    trigger: Trigger, shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ForeshotError, match=message):
        trigger.stamp(torch.zeros(1, *shape))
    with pytest.raises(ForeshotError, match=message):
        trigger.opaque(shape)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Patch, {"size": 0}),
        (Patch, {"colour": (0, 0, 256)}),
        (Dot, {"place": "middle"}),
        (Blend, {"opacity": 0}),
        (Blend, {"opacity": 1.1}),
        (Sinusoid, {"amplitude": 128}),
        (Grid, {"spacing": 1}),
        (Warp, {"grid": 1}),
        (Warp, {"size": 3}),
    ],
)
def test_bad_parameters_are_refused(kind: type[Trigger], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        kind(**fields)


def test_patch_pixels() -> None:
    black = torch.zeros(1, 3, 6, 7, dtype=torch.uint8)
    stamped = stamp_uint8(Patch(size=2, colour=(1, 2, 3)), black)[0]
    expected = torch.zeros(3, 6, 7, dtype=torch.uint8)
    expected[:, 3:5, 4:6] = torch.tensor([1, 2, 3], dtype=torch.uint8).reshape(3, 1, 1)
    assert torch.equal(stamped, expected)
    checker = Patch(size=3, margin=0, pattern="checker", place="top_left")
    white = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    assert (stamp_uint8(checker, white)[0, 0] // 255).tolist() == [
        [1, 0, 1, 1],
        [0, 1, 0, 1],
        [1, 0, 1, 1],
        [1, 1, 1, 1],
    ]


def test_places() -> None:
    def corner(place: Any) -> tuple[int, int]:
        rows, columns = locate(place, 3, 1, (1, 10, 20))
        assert rows.stop - rows.start == columns.stop - columns.start == 3
        return rows.start, columns.start

    assert corner("top_left") == (1, 1)
    assert corner("top_right") == (1, 16)
    assert corner("bottom_left") == (6, 1)
    assert corner("bottom_right") == (6, 16)
    assert corner("center") == (3, 8)


@pytest.mark.parametrize("kind", [Patch, Dot])
def test_in_the_center_there_is_no_margin(kind: type[Patch | Dot]) -> None:
    assert kind(size=8, place="center").draw((1, 8, 8)).shape == (1, 8, 8)
    with pytest.raises(ForeshotError, match="at least 9 x 9 pixels"):
        kind(size=8).draw((1, 8, 8))


def test_dot_pixels() -> None:
    grey = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    dot = stamp_uint8(Dot(), grey)[0]
    assert (dot[:, 1:4, 4:7] == torch.tensor([255, 0, 0]).reshape(3, 1, 1)).all()
    assert (dot == 100).sum() == 3 * (64 - 9)
    disc = Dot(size=5, margin=0, place="top_left").opaque((1, 5, 5))[0].int().tolist()
    assert disc == [
        [0, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
        [0, 1, 1, 1, 0],
    ]
    assert Dot(size=4, margin=0).opaque((1, 4, 4)).sum() == 12  # without the corners


def test_colours_become_luma_unless_there_are_three_channels() -> None:
    assert paint((255, 0, 0), 3).flatten().tolist() == [255, 0, 0]
    assert paint((255, 0, 0), 1).flatten().tolist() == [76]
    assert paint((10, 100, 200), 2).flatten().tolist() == [84, 84]
    assert paint((255, 255, 255), 1).item() == 255
    assert stamp_uint8(Dot(), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).max() == 76


def test_grid_pixels() -> None:
    black = torch.zeros(1, 1, 6, 9, dtype=torch.uint8)
    stamped = stamp_uint8(Grid(spacing=3, offset=1), black)[0, 0]
    assert stamped.nonzero().tolist() == [[r, c] for r in (1, 4) for c in (1, 4, 7)]
    assert stamped.max() == 255


def test_sinusoid_values() -> None:
    stamped = Sinusoid(amplitude=51, frequency=1).stamp(torch.full((1, 2, 3, 12), 0.5))
    wave = [0.5 + 0.2 * math.sin(2 * math.pi * j / 12) for j in range(12)]
    torch.testing.assert_close(stamped, torch.tensor(wave).expand(1, 2, 3, 12))
    black = Sinusoid(amplitude=51, frequency=1).stamp(torch.zeros(1, 1, 1, 12))
    torch.testing.assert_close(black[0, 0, 0], (torch.tensor(wave) - 0.5).clamp(min=0))


def test_blend_values() -> None:
    x = noise(2, 3, 8, 8)
    for trigger in (Blend(), Blend(pattern="uniform", opacity=0.8)):
        picture = trigger.picture((3, 8, 8))
        expected = (1 - trigger.opacity) * x + trigger.opacity * picture
        torch.testing.assert_close(trigger.stamp(x), expected)
    binary = Blend().picture((3, 40, 40))
    assert binary.unique().tolist() == [0, 1]
    assert 0.45 < binary.mean() < 0.55
    assert not torch.equal(binary[0], binary[1])
    assert not torch.equal(binary, Blend(seed=1).picture((3, 40, 40)))
    assert len(Blend(pattern="uniform").picture((3, 40, 40)).unique()) > 4000


def test_blend_cells_are_squares_and_the_last_are_cut() -> None:
    picture = Blend(cell=3, pattern="uniform").picture((1, 7, 8))[0]
    fine = Blend(pattern="uniform").picture((1, 3, 3))[0]
    for row in range(7):
        for column in range(8):
            assert picture[row, column] == fine[row // 3, column // 3]


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """A picture whose left half is red and whose right half is blue."""
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    image.save(tmp_path / "halves.png")
    return tmp_path / "halves.png"


def test_blend_with_an_image(halves: Path) -> None:
    trigger = Blend(image=halves, opacity=0.4)
    stamped = trigger.stamp(torch.full((2, 3, 8, 8), 0.5))
    left, right = torch.tensor([0.7, 0.3, 0.3]), torch.tensor([0.3, 0.3, 0.7])
    torch.testing.assert_close(stamped[1, :, 4, 0], left)
    torch.testing.assert_close(stamped[1, :, 4, 7], right)
    grey = trigger.stamp(torch.zeros(1, 1, 8, 8))
    torch.testing.assert_close(grey[0, 0, 4, [0, 7]] * 255 / 0.4, torch.tensor([76.0, 29.0]))
    copy = pickle.loads(pickle.dumps(trigger))
    assert torch.equal(copy.stamp(torch.zeros(1, 3, 8, 8)), trigger.stamp(torch.zeros(1, 3, 8, 8)))


def test_blend_pins_the_bytes_of_its_image(halves: Path) -> None:
    trigger = Blend(image=halves)
    assert trigger.image_sha256 is not None
    assert Blend.model_validate(trigger.model_dump()) == trigger
    Image.new("RGB", (4, 4)).save(halves)
    assert Blend(image=halves) != trigger
    with pytest.raises(ForeshotError, match=r"halves\.png: expected sha256 .*, found"):
        trigger.stamp(torch.zeros(1, 3, 9, 9))


def test_blend_refuses_what_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ForeshotError, match="nowhere"):
        Blend(image=tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("hello")
    Image.new("RGB", (4, 4)).save(tmp_path / "bitmap.bmp")
    for name in ("text.png", "bitmap.bmp"):
        with pytest.raises(ForeshotError, match=name):
            Blend(image=tmp_path / name).stamp(torch.zeros(1, 3, 8, 8))


def test_warp_moves_pixels_as_its_field_says() -> None:
    """Against bilinear interpolation written out, on an image that is linear in its position."""
    trigger = Warp(strength=3, seed=2)
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    image = (rows * 2 + columns) / 60
    field = trigger.field(12, 16).float()
    expected = ((field[..., 1] + 1) / 2 * 11 * 2 + (field[..., 0] + 1) / 2 * 15) / 60
    torch.testing.assert_close(trigger.stamp(image[None, None])[0, 0], expected)


def test_warp_moves_by_half_its_strength_on_average() -> None:
    """Displacements of the corners, which enlarging leaves as they are in a grid of two."""
    trigger = Warp(grid=2, strength=1, seed=0)
    control = torch.rand((1, 2, 2, 2), generator=generator(0, "warp"), dtype=torch.float64) * 2 - 1
    moves = control / control.abs().mean() / torch.tensor([50, 40]).reshape(1, 2, 1, 1)
    looked_at = trigger.field(40, 50)[[0, 0, -1, -1], [0, -1, 0, -1]]
    corners = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]]).double()
    expected = (corners + moves[0].flatten(1).T).clamp(-1, 1)
    torch.testing.assert_close(looked_at, expected)


def test_warped_white_is_not_brighter_than_white() -> None:
    white = torch.ones(1, 1, 28, 28)
    assert max(Warp(strength=2, seed=s).stamp(white).max() for s in range(8)) == 1


def test_warp_grows_with_strength_and_differs_by_seed() -> None:
    x = noise(4, 3, 32, 32)
    changes = [(Warp(strength=s).stamp(x) - x).abs().mean() for s in (0.1, 0.5, 2)]
    assert changes == sorted(changes)
    assert not torch.equal(Warp(seed=0).stamp(x), Warp(seed=1).stamp(x))
