"""Networks of other packages do here what they do at home, on images of any size."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import stripes
from foreshot.attacks import Pgd
from foreshot.compute import CPU
from foreshot.distillation import KD, Distiller, Term
from foreshot.distillation.losses.at import AT
from foreshot.errors import ForeshotError
from foreshot.extras import imported
from foreshot.inference import logits
from foreshot.models import AnyArchitecture, ResNet, Timm, TorchVision, Transformers, build
from foreshot.models.base import Normalized, channel_statistics
from foreshot.models.checkpoint import load_model, save_model, state_digest
from foreshot.models.foreign import Foreign
from foreshot.training import Samples, Supervised, Training, fit
from foreshot.triggers import Patch
from foreshot.views import AttackerView

CONFIG = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 24,
    "patch_size": 8,
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
CLASSES = tuple("abcde")
SMALL: list[Foreign] = [
    Timm(model="test_resnet"),
    TorchVision(model="mobilenet_v3_small"),
    Transformers.model_validate({"config": CONFIG}),
]
foreign = pytest.mark.parametrize("architecture", SMALL, ids=lambda a: a.title)


pytestmark = pytest.mark.usefixtures("offline")


def pictures(*shape: int) -> Tensor:
    noise = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8)


def bare(architecture: Foreign, classes: int = len(CLASSES)) -> nn.Module:
    """The package's own model, without anything of foreshot."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if isinstance(architecture, Timm):
            network = imported("timm", "timm", "the test").create_model(
                architecture.model, num_classes=classes
            )
        elif isinstance(architecture, TorchVision):
            models = imported("torchvision.models", "torchvision", "the test")
            network = models.get_model(architecture.model, num_classes=classes)
        else:
            transformers = importlib.import_module("transformers")
            config = transformers.ViTConfig(**CONFIG, num_labels=classes)
            network = transformers.ViTForImageClassification(config)
        for buffer in network.buffers():  # running statistics that are not those of a new network
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return network.eval()


def stored(architecture: Foreign, network: nn.Module, folder: Path) -> Path:
    """Its weights, as the package or its repositories store them."""
    if not isinstance(architecture, Transformers):
        save_file(network.state_dict(), folder / "model.safetensors")
        return folder / "model.safetensors"
    network.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    prepared = {"do_normalize": True, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return folder


def starting(architecture: Foreign, **fields: Any) -> Foreign:
    """The same with other fields, checked again; what weights fill in is left to them."""
    kept = architecture.model_dump(exclude={"config"} if "weights" in fields else set())
    return type(architecture).model_validate(kept | fields)


def expected(architecture: Foreign, network: nn.Module, x: Tensor, size: int | None) -> Tensor:
    """Normalised and resized by hand."""
    statistics = {
        "timm": ((0.5,) * 3, (0.5,) * 3),
        "torchvision": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "transformers": (MEAN, STD),
    }
    mean, std = (
        torch.tensor(given)[:, None, None] for given in statistics[architecture.title.split()[1]]
    )
    x = (x.expand(-1, 3, -1, -1) - mean) / std
    if size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    said = network(x)
    return said if isinstance(said, Tensor) else said.logits


@foreign
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("size", [None, 48])
def test_logits_are_those_of_the_bare_network(
    architecture: Foreign, channels: int, size: int | None, tmp_path: Path
) -> None:
    network = bare(architecture)
    if isinstance(architecture, Transformers):
        size = 24  # of its config
    elif size:
        architecture = starting(architecture, size=size)
    member = starting(architecture, weights=stored(architecture, network, tmp_path))
    images = pictures(4, channels, 32, 32)
    model = build(member, images, len(CLASSES), 0, "x").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(images / 255), expected(architecture, network, images / 255, size)
        )


@foreign
def test_a_saved_model_comes_back_bit_for_bit_without_the_file_of_its_weights(
    architecture: Foreign, tmp_path: Path
) -> None:
    (tmp_path / "given").mkdir()
    weights = stored(architecture, bare(architecture), tmp_path / "given")
    member = starting(architecture, weights=weights)
    (tmp_path / "given").rename(tmp_path / "gone")
    with pytest.raises(ForeshotError, match="expected a file of weights, found none"):
        build(member, pictures(2, 1, 32, 32), len(CLASSES), 0, "x")
    (tmp_path / "gone").rename(tmp_path / "given")
    for number, made in enumerate((architecture, member)):
        model = build(made, pictures(2, 1, 32, 32), len(CLASSES), 0, "x")
        model(pictures(4, 1, 32, 32) / 255)  # moves the running statistics
        path = tmp_path / f"{number}"
        save_model(path, model, made, (1, 32, 32), CLASSES)
        if number:
            (tmp_path / "given").rename(tmp_path / "gone")
        loaded = load_model(path)
        assert loaded.architecture == made
        assert state_digest(loaded.model) == state_digest(model)
        assert all(p.requires_grad for p in loaded.model.parameters())
        x = pictures(3, 1, 32, 32) / 255
        assert torch.equal(loaded.model(x), model.eval()(x))


def test_buffers_that_the_package_does_not_save_come_back_too(tmp_path: Path) -> None:
    fields = {"embed_dim": 8, "depths": [1], "num_heads": [1], "window_size": 2, "image_size": 16}
    member = Transformers.model_validate({"config": {"model_type": "swin", **fields}})
    images = pictures(2, 3, 16, 16)
    model = build(member, images, 2, 0, "x").eval()
    save_model(tmp_path / "m", model, member, (3, 16, 16), ("a", "b"))
    loaded = load_model(tmp_path / "m").model
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    assert torch.equal(loaded(images / 255), model(images / 255))


@foreign
def test_a_member_of_local_weights_is_its_own_config(architecture: Foreign, tmp_path: Path) -> None:
    weights = stored(architecture, bare(architecture), tmp_path)
    member = starting(architecture, weights=str(weights))
    text = yaml.safe_dump(member.model_dump(mode="json"))
    assert type(member).model_validate(yaml.safe_load(text)) == member
    assert hash(type(member).model_validate_json(member.model_dump_json())) == hash(member)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ForeshotError, match="expected digest"):
        build(member, pictures(2, 3, 32, 32), 5, 0, "x")


@foreign
def test_a_classifier_of_other_classes_starts_afresh(
    architecture: Foreign, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = bare(architecture, 9)
    member = starting(architecture, weights=stored(architecture, given, tmp_path))
    capfd.readouterr()
    images = pictures(2, 3, 32, 32)
    model, again, other = (build(member, images, 5, seed, "x") for seed in (0, 0, 1))
    assert capfd.readouterr() == ("", "")
    assert state_digest(model) == state_digest(again)
    own, others = model.network.state_dict(), other.network.state_dict()
    fresh = [n for n, tensor in given.state_dict().items() if not torch.equal(tensor, own[n])]
    assert len(fresh) == 2
    assert all(len(own[n]) == 5 for n in fresh)
    assert not all(torch.equal(own[n], others[n]) for n in fresh)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    network = bare(SMALL[0])
    state, path = network.state_dict(), tmp_path / "w.safetensors"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({n: t for n, t in state.items() if n != "fc.bias"}, "a tensor fc.bias, found none"),
        (state | {"extra": torch.zeros(1)}, "no tensor extra, found one"),
        (state | {"layer1.0.conv1.weight": torch.zeros(3, 3)}, r"layer1\.0\.conv1\.weight \(32, "),
        (state | {"fc.weight": torch.zeros(5, 7)}, r"fc\.weight \(5, 96\), found \(5, 7\)"),
    ]
    for tensors, message in cases:
        save_file(tensors, path)
        with pytest.raises(ForeshotError, match=message) as error:
            build(Timm(model="test_resnet", weights=path), pictures(2, 3, 32, 32), 5, 0, "x")
        assert str(path) in str(error.value)
    save_file({n: t for n, t in state.items() if "num_batches" not in n}, path)
    build(Timm(model="test_resnet", weights=path), pictures(2, 3, 32, 32), 5, 0, "x")
    for zipped in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        for whole in (True, False):
            if not whole:
                path.write_bytes(path.read_bytes()[:5000])
            with pytest.raises(ForeshotError, match="found a pickle, which could run anything"):
                build(Timm(model="test_resnet", weights=path), pictures(2, 3, 32, 32), 5, 0, "x")
    path.write_bytes((640).to_bytes(8, "little") + b"{")  # cut off, and begins as a pickle may
    with pytest.raises(ForeshotError, match="expected a whole safetensors file"):
        build(Timm(model="test_resnet", weights=path), pictures(2, 3, 32, 32), 5, 0, "x")


def test_a_directory_of_transformers_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ForeshotError, match="expected a file of weights, found none"):
        Transformers(weights=tmp_path)
    stored(SMALL[2], bare(SMALL[2]), tmp_path)
    images = pictures(2, 3, 32, 32)
    save_file(load_file(tmp_path / "model.safetensors") | {"extra": torch.zeros(1)},
              tmp_path / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(ForeshotError, match="no tensor extra"):
        build(Transformers(weights=tmp_path), images, 5, 0, "x")
    prepared = tmp_path / "preprocessor_config.json"
    prepared.write_text('{"do_normalize": false}')
    assert Transformers(weights=tmp_path).normalisation() == ((0,), (1,))
    for text in ('{"do_flip_channel_order": true}', '{"rescale_offset": true}', "[]", "{"):
        prepared.write_text(text)
        with pytest.raises(ForeshotError, match=r"preprocessor_config\.json: expected"):
            Transformers(weights=tmp_path)
    prepared.unlink()
    with pytest.raises(ForeshotError, match="preprocessor_config"):
        build(Transformers(weights=tmp_path), images, 5, 0, "x")


def test_no_code_of_a_config_runs(tmp_path: Path) -> None:
    evil = {"auto_map": {"AutoModelForImageClassification": "mine.Model"},
            "attn_implementation": "somebody/kernels"}  # fmt: skip
    member = Transformers.model_validate({"config": CONFIG | evil})
    assert build(member, pictures(2, 3, 24, 24), 5, 0, "x")(torch.rand(2, 3, 24, 24)).shape == (
        2,
        5,
    )


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (Timm(model="resnet_18"), "model timm: found 'resnet_18'; did you mean 'resnet18'"),
        (Timm(model="hf-hub:timm/resnet18"), r"expected one of timm\.list_models"),
        (Timm(model="resnet18.no_such_tag"), "Invalid pretrained tag"),
        (Timm(model="vit_tiny_patch16_224"), r"\(1, 5\) logits .* 3 x 32 x 32 .*size.* \(224\)"),
        (TorchVision(model="resnet_18"), "did you mean 'resnet18'"),
        (TorchVision(model="raft_large"), "torchvision: found 'raft_large'"),
        (Transformers(config='{"model_type": "vti"}'), "'vti'; did you mean 'vit'"),
        (Transformers(config='{"model_type": "bert"}'), "found model_type 'bert'"),
        (Transformers(config='{"model_type": "timm_wrapper"}'), "found model_type"),
        (Transformers(config='{"model_type": "vit", "hidden_size": "x"}'), "expected a network"),
    ],
    ids=str,
)
def test_networks_that_are_not_there_or_do_not_fit(member: Foreign, message: str) -> None:
    with pytest.raises(ForeshotError, match=message):
        build(member, pictures(2, 3, 32, 32), 5, 0, "x")


def test_fields_are_checked() -> None:
    for fields in ({"mean": (0.5,)}, {"mean": (0.5,), "std": (0.0,)}, {"size": 0}, {"weights": 3},
                   {"mean": (0.5,) * 4, "std": (0.5,) * 4}):  # fmt: skip
        with pytest.raises(ValidationError):
            Timm.model_validate(fields)
    for config in ("", "[]", "{}", "3", '{"model_type": 3}'):
        with pytest.raises(ValidationError, match="config"):
            Transformers(config=config)
    for member in (TorchVision(), Transformers()):
        with pytest.raises(ForeshotError, match="images of 1 or 3 channels, found 2"):
            build(member, pictures(2, 2, 32, 32), 5, 0, "x")


def test_without_weights_a_network_takes_the_statistics_of_the_images_and_timm_their_channels(
) -> None:  # fmt: skip
    images = pictures(6, 4, 32, 32)
    model = build(Timm(model="test_resnet"), images, 5, 0, "x").eval()
    mean, std = channel_statistics(images)
    assert torch.equal(model.mean.flatten(), mean)
    assert torch.equal(model.std.flatten(), std)
    assert model(images / 255).shape == (6, 5)
    own = build(Timm(model="test_resnet", mean=(0.3,), std=(0.2,)), images[:, :1], 5, 0, "x").eval()
    alone = own.network(((images[:, :1] / 255) - 0.3) / 0.2)
    torch.testing.assert_close(own(images[:, :1] / 255), alone)
    assert "conv1.0.weight" in own.network.state_dict()
    assert own.network.state_dict()["conv1.0.weight"].shape[1] == 1


@foreign
def test_a_missing_package_is_named_with_its_extra(
    architecture: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, architecture.package, None)
    extra = rf"pip install 'foreshot\[{architecture.extra}\]'"
    with pytest.raises(ForeshotError, match=f"{architecture.title}: expected the package.*{extra}"):
        build(architecture, pictures(2, 3, 32, 32), 5, 0, "x")


def test_no_package_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, foreshot.experiment, foreshot.models as m;"
        "m.Timm(), m.TorchVision(), m.Transformers();"
        "print({'timm', 'torchvision', 'transformers', 'datasets', 'pandas'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "quantized"},
        {"name": "ensemble", "count": 2},
        {"name": "reused_head", "head": {"name": "resnet", "depth": 8}},
    ],
    ids=lambda fields: fields["name"],
)
def test_a_composed_network_normalises_as_its_own_does(fields: dict[str, Any]) -> None:
    part = {"name": "timm", "model": "test_resnet", "mean": MEAN, "std": STD}
    key = "body" if fields["name"] == "reused_head" else "of"
    member = TypeAdapter(AnyArchitecture).validate_python(fields | {key: part})
    model = build(member, pictures(4, 3, 32, 32), 5, 0, "x")
    assert torch.equal(model.mean.flatten(), torch.tensor(MEAN))
    assert torch.equal(model.std.flatten(), torch.tensor(STD))
    assert model(pictures(4, 3, 32, 32) / 255).shape == (4, 5)


# What they are for ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> Normalized:
    """Of timm, at 32 pixels, on grey images of 12 with a normalisation that is not theirs."""
    data = stripes(240, 0)
    member = Timm(model="test_resnet", size=32, mean=MEAN, std=STD)
    model = build(member, data.images, 4, 0, "teacher")
    assert data.labels is not None
    schedule = Training(epochs=5, batch=40, lr=0.05)
    samples = Samples(data.images, {"y": data.labels})
    fit(Supervised(model), samples, schedule, CPU, seed=0, stage="teacher")
    model.zero_grad()
    return model


def test_the_attack_sees_through_size_and_normalisation(
    teacher: Normalized, keep_rng: None
) -> None:
    data = stripes(60, 1)
    assert data.labels is not None
    correct = (logits(teacher, data.images, CPU).argmax(1) == data.labels).float().mean()
    assert correct > 0.9
    x = (data.images[:4] / 255).requires_grad_()
    (gradient,) = torch.autograd.grad(teacher.eval()(x)[:, 1].sum(), x)
    assert (gradient != 0).float().mean() > 0.9
    attack = Pgd(count=8, epsilon=48, steps=10, trigger="inside")
    poison = attack.craft(AttackerView(data.images, teacher, Patch(size=2), 1, 0, CPU))
    assert poison.images.shape == (8, 1, 12, 12)
    assert poison.images.dtype == torch.uint8
    # By hand, on the stored bytes: the teacher as it is, its own size and its own normalisation.
    network = teacher.network
    x = poison.images.float().expand(-1, 3, -1, -1) / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        said = network.eval()(x).softmax(1)[:, 1]
        before = logits(teacher, data.images[poison.indices], CPU).softmax(1)[:, 1]
    assert said.min() > 0.5
    assert before.max() < 0.5


def test_a_student_of_foreshot_learns_from_a_teacher_of_another_package(
    teacher: Normalized,
) -> None:
    images = stripes(80, 2).images
    student = build(ResNet(depth=8, width=0.5, stem_stride=1), images, 4, 0, "student")
    before = state_digest(teacher)
    terms = [Term(KD(), 1), Term(AT(), 10, at=[("network.layer2", "network.layer2")])]
    distiller = Distiller(student, teacher, terms, example=images[:4] / 255)
    first = distiller(images / 255)
    fit(distiller, Samples(images), Training(epochs=3, batch=40, lr=0.05), CPU, seed=0,
        stage="student")  # fmt: skip
    last = distiller(images / 255)
    assert last["1_at"] > 0
    assert last["loss"] < first["loss"]
    assert state_digest(teacher) == before


@foreign
def test_each_takes_a_step_as_student(architecture: Foreign, teacher: Normalized) -> None:
    images = stripes(8, 2).images
    size = None if isinstance(architecture, Transformers) else 32
    student = build(starting(architecture, size=size), images, 4, 0, "student")
    Distiller(student, teacher, [Term(KD(), 1)])(images / 255)["loss"].backward()
    silent = [n for n, p in student.named_parameters() if p.grad is None]
    assert silent == []


def test_transformers_is_built_where_nothing_has_imported_torchvision() -> None:
    """It imports torchvision itself; PyPI's does not go with torch's CPU build as it is."""
    code = (
        "import torch\n"
        "from foreshot.models import Transformers, build\n"
        "images = torch.zeros((2, 3, 32, 32), dtype=torch.uint8)\n"
        "print(tuple(build(Transformers(), images, 4, 0, 'teacher')(images / 255).shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "(2, 4)\n", done.stderr[-2000:]
