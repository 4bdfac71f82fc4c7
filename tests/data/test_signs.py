from hashlib import sha256
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from foreshot.data.sign_atlas import BLURS, CLASSES, TEXELS, atlas
from foreshot.data.signs import Signs, render


@pytest.fixture(scope="module")
def train() -> tuple[Tensor, Tensor]:
    return render("train", torch.arange(2000), 32, 0)


@pytest.fixture(scope="module")
def test() -> tuple[Tensor, Tensor]:
    return render("test", torch.arange(1000), 32, 0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 1999), min_size=1, max_size=150))
def test_an_image_depends_on_its_index_and_not_on_its_company(train, indices):
    chosen = torch.tensor(indices)
    images, labels = render("train", chosen, 32, 0)
    assert torch.equal(images, train[0][chosen])
    assert torch.equal(labels, train[1][chosen])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.sampled_from([16, 23, 33, 48]), st.integers(1, 39))
def test_slices_join_to_the_whole_at_any_size(size, cut):
    whole = render("test", torch.arange(40), size, 3)
    parts = [render("test", part, size, 3) for part in torch.arange(40).split([cut, 40 - cut])]
    for joined, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(joined), expected)


def test_rendering_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        render("train", torch.arange(2), 16, 0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_bytes_are_pinned():
    # Integer operations and single IEEE operations only: the same on every processor.
    images, labels = render("train", torch.arange(43), 16, 0)
    digest = sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert digest == "ecf65e65cbc21ed47ac43abadc3cad53d018284541b2e5d8ddd8bf01ad2aace4"


def test_each_run_of_43_holds_every_class_once_in_an_order_of_its_own(train):
    runs = train[1][: 43 * 46].view(46, 43)
    assert torch.equal(runs.sort(1).values, torch.arange(43).expand(46, 43))
    assert len(runs.unique(dim=0)) > 40


def test_no_image_is_in_both_splits_or_twice_in_one(train, test):
    both = torch.cat([train[0], test[0]]).flatten(1)
    assert len({row.numpy().tobytes() for row in both}) == len(both)


def test_seed_and_split_each_give_other_images_and_another_order(train, test):
    other = render("train", torch.arange(1000), 32, 1)
    for images, labels in (other, test):
        difference = (images.int() - train[0][:1000].int()).abs().float().mean((1, 2, 3))
        assert difference.min() > 3
        assert 0.005 < (labels == train[1][:1000]).float().mean() < 0.06


def test_size_changes_the_resolution_and_not_the_scene(train):
    large, labels = render("train", torch.arange(100), 64, 0)
    assert torch.equal(labels, train[1][:100])
    pair = F.avg_pool2d(large.float(), 4), F.avg_pool2d(train[0][:100].float(), 2)
    alike, unlike = (
        F.cosine_similarity(*(p - p.mean((2, 3), keepdim=True) for p in (a, b)), dim=1).mean()
        for a, b in (pair, (pair[0], pair[1].roll(1, 0)))
    )
    assert alike > 0.9
    assert unlike < 0.5


def test_any_two_classes_differ_at_every_blur():
    texels = atlas().view(torch.uint8).view(43, len(BLURS), -1).float()
    for a, b in combinations(range(43), 2):
        assert (texels[a] - texels[b]).abs().mean(1).min() > 1, (CLASSES[a], CLASSES[b])


def test_blur_keeps_the_colour_that_a_sign_sheds():
    # Box filters only move colour about; each sign lies far enough inside its sheet to lose none.
    sums = atlas().view(torch.uint8).view(43, len(BLURS), TEXELS**2, 4).double().sum(2)
    assert torch.allclose(sums, sums[:, :1].expand_as(sums), rtol=0.005)


def test_pixels_alone_tell_the_classes_badly_but_above_chance(train, test):
    means = torch.stack([train[0][train[1] == c].float().mean(0).flatten() for c in range(43)])
    nearest = torch.cdist(test[0].float().flatten(1), means).argmin(1)
    accuracy = (nearest == test[1]).float().mean()
    assert 3 / 43 < accuracy < 0.5


def test_no_image_carries_a_red_dot_in_its_corner(train, test):
    corners = torch.cat([train[0], test[0]])[:, :, :3, -3:].float()
    red = torch.tensor([255.0, 0, 0]).view(1, 3, 1, 1)
    assert (corners - red).abs().mean((1, 2, 3)).min() > 10


def test_load_is_the_rendering_of_both_splits_and_begins_as_a_larger_set_does(tmp_path: Path):
    small = Signs(train=90, test=50, seed=5).load(tmp_path)
    large = Signs(train=200, test=60, seed=5).load(tmp_path)
    assert small.train.classes == small.test.classes == CLASSES
    assert len(set(CLASSES)) == 43
    assert small.train.digest == large.train.select(torch.arange(90)).digest
    assert small.test.digest == large.test.select(torch.arange(50)).digest
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [{"train": 0}, {"test": 0}, {"size": 8}, {"size": 500}])
def test_fields_are_bounded(bad):
    with pytest.raises(ValidationError):
        Signs(**bad)
