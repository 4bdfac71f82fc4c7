"""A model comes back bit for bit, and a file that is not whole and fitting is refused."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreshot.errors import ForeshotError
from foreshot.models import build
from foreshot.models.base import Normalized
from foreshot.models.checkpoint import LoadedModel, load_model, save_model, state_digest
from foreshot.models.mobilenet import MobileNetV2
from foreshot.models.resnet import ResNet
from foreshot.models.vit import Vit

SHAPE = (2, 8, 8)
CLASSES = ("cat", "<dog>", "ünï")
TINY = ResNet(depth=8, width=0.25)


def tiny() -> Normalized:
    images = torch.arange(4 * 128).reshape(4, *SHAPE).remainder(251).to(torch.uint8)
    model = build(TINY, images, len(CLASSES), seed=3, key="x").train()
    model(images / 255)  # so that the running statistics are not what a new network has
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "folder" / "model.safetensors", tiny(), TINY, SHAPE, CLASSES)
    return tmp_path / "folder" / "model.safetensors"


def rewrite(path: Path, state: dict[str, Tensor] | None = None, **changes: Any) -> None:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["foreshot-model"])
    header = {key: value for key, value in (header | changes).items() if value is not None}
    save_file(state or load_file(path), path, {"foreshot-model": json.dumps(header)})


def test_round_trip_is_exact(saved: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loaded = load_model(saved)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded[1:] == (TINY, SHAPE, CLASSES)
    assert not any(module.training for module in loaded.model.modules())
    assert all(p.requires_grad for p in loaded.model.parameters())
    model = tiny()
    assert state_digest(loaded.model) == state_digest(model)
    x = torch.rand(3, *SHAPE)
    assert torch.equal(loaded.model(x), model.eval()(x))


@pytest.mark.parametrize("architecture", [MobileNetV2(width=0.25), Vit(dim=8, depth=3, heads=1)])
def test_other_architectures_round_trip(tmp_path: Path, architecture: Any) -> None:
    images = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    model = build(architecture, images, 2, seed=0, key="x").eval()
    save_model(tmp_path / "m", model, architecture, (1, 16, 16), ("a", "b"))
    assert torch.equal(load_model(tmp_path / "m").model(images / 255), model(images / 255))


def test_saving_twice_writes_the_same_bytes_and_leaves_nothing_else(saved: Path) -> None:
    content = saved.read_bytes()
    save_model(saved, tiny(), TINY, SHAPE, CLASSES)
    assert saved.read_bytes() == content
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_refuses_a_model_that_the_header_does_not_describe(tmp_path: Path) -> None:
    with pytest.raises(ForeshotError, match=r"network\.fc\.weight .*\(2, 16\), found .*\(3, 16\)"):
        save_model(tmp_path / "m", tiny(), TINY, SHAPE, CLASSES[:2])
    with pytest.raises(ForeshotError, match=r"network\.layer1\.1\.conv1\.weight"):
        save_model(tmp_path / "m", tiny(), TINY.model_copy(update={"depth": 14}), SHAPE, CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_digest_sees_every_parameter_and_buffer_but_no_layout() -> None:
    model = tiny()
    digest = state_digest(model)
    assert digest == state_digest(tiny())
    copy = tiny()
    for parameter in copy.parameters():
        parameter.data = parameter.data.contiguous()
    assert digest == state_digest(copy)
    for tensor in [*model.parameters(), *model.buffers()]:
        with torch.no_grad():
            tensor.add_(1)
        assert state_digest(model) != digest
        digest = state_digest(model)
    assert state_digest(tiny().double()) != state_digest(tiny())


def test_digest_tells_names_and_shapes_apart() -> None:
    def module(name: str, shape: tuple[int, ...]) -> torch.nn.Module:
        root = torch.nn.Module()
        root.register_buffer(name, torch.zeros(shape))
        return root

    shapes = [("a", (4,)), ("b", (4,)), ("a", (2, 2)), ("a", ()), ("a", (0,))]
    assert len({state_digest(module(*one)) for one in shapes}) == len(shapes)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    for name, content in {"text": b"hello", "empty": b"", "pickle": b"\x80\x04N."}.items():
        (tmp_path / name).write_bytes(content)
    save_file({"x": torch.zeros(1)}, tmp_path / "bare")
    for name in ("text", "empty", "pickle", "nowhere", "bare"):
        with pytest.raises(ForeshotError, match=name):
            load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, r"foreshot-model\.format: Input should be 'foreshot-model'"),
        ({"version": 2}, r"foreshot-model\.version: Input should be 1"),
        ({"architecture": {"name": "alexnet"}}, r"architecture: .*'alexnet'.*'resnet'"),
        ({"architecture": {"name": "resnet", "depth": 9}}, r"architecture\.resnet\.depth"),
        ({"architecture": {"name": "resnet", "depth": 14, "width": 0.25}}, "found no such tensor"),
        ({"architecture": {"name": "vit"}}, r"expected token .*|network\.token"),
        ({"classes": []}, r"foreshot-model\.classes"),
        ({"classes": ["a"]}, r"network\.fc\.weight torch\.float32 \(1, 16\), found .*\(3, 16\)"),
        ({"classes": ["cat", "<dog>", "cow"]}, "expected digest"),
        ({"classes": None}, r"foreshot-model\.classes: Field required"),
        ({"shape": [2, 3, 3]}, "at least 4 x 4 pixels, found 3 x 3"),
        ({"shape": [2, 8, 9]}, "expected digest"),
        ({"shape": [1, 8, 8]}, r"network\.conv1\.weight"),
        ({"shape": [2, 8, 10**12]}, r"foreshot-model\.shape\.2"),
    ],
    ids=str,
)
def test_altered_headers_are_named(saved: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(saved, **changes)
    with pytest.raises(ForeshotError, match=message) as error:
        load_model(saved)
    assert str(saved) in str(error.value)


def test_misfitting_states_are_named(saved: Path) -> None:
    state = load_file(saved)
    bias = state["network.fc.bias"]
    without = {name: tensor for name, tensor in state.items() if name != "network.fc.bias"}
    for changed, message in [
        (without, "expected network.fc.bias .*, found no such tensor"),
        (state | {"extra": bias + 1}, "expected no tensor extra"),
        (state | {"network.fc.bias": bias.double()}, "float32 .*found torch.float64"),
        (state | {"network.fc.bias": bias + 1}, "expected digest"),
    ]:
        rewrite(saved, changed)
        with pytest.raises(ForeshotError, match=message):
            load_model(saved)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("model") / "m"
    save_model(path, tiny(), TINY, SHAPE, CLASSES)
    return path.read_bytes()


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_no_truncated_file_loads(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ForeshotError):
        load_model(path)


@settings(max_examples=60, deadline=None)
@given(where=st.one_of(st.integers(0, 8000), st.floats(0, 1)), flip=st.integers(1, 255))
def test_a_changed_byte_is_refused_or_of_no_effect(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, where: float, flip: int
) -> None:
    changed = bytearray(content)
    index = where if isinstance(where, int) else int(where * (len(content) - 1))
    changed[index] ^= flip
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(changed)
    loaded: LoadedModel | None = None
    with suppress(ForeshotError):
        loaded = load_model(path)
    if loaded:
        assert state_digest(loaded.model) == state_digest(tiny())
        assert loaded[1:] == (TINY, SHAPE, CLASSES)
