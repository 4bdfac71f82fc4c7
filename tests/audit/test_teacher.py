"""Networks of other packages as teachers of an audit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import CLASSES, SIDE, Tiny
from foreshot.audit.job import alike
from foreshot.audit.teacher import Teacher, load_teacher
from foreshot.compute import CPU
from foreshot.errors import ForeshotError
from foreshot.extras import imported
from foreshot.models.checkpoint import network_digest


def test_weights_of_timm_say_how_many_classes_there_are(
    tmp_path: Path, keep_rng: None, offline: None
) -> None:
    imported("torchvision", "torchvision", "timm")
    timm = imported("timm", "timm", "timm")
    with torch.random.fork_rng():
        network = timm.create_model("test_resnet", num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    named = "{name: timm, model: test_resnet, mean: [0.5, 0.4, 0.3], std: [0.2, 0.3, 0.4]}"
    teacher = load_teacher(tmp_path / "weights.safetensors", named, 32, CPU)
    assert (teacher.shape, teacher.classes) == ((3, 32, 32), tuple("0123456"))
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    with torch.no_grad():
        expected = network((x - mean[:, None, None]) / std[:, None, None])
        torch.testing.assert_close(teacher.model(x), expected)
    with pytest.raises(ForeshotError, match="expected weights of model timm resnet18 for two "):
        load_teacher(tmp_path / "weights.safetensors", "{name: timm, model: resnet18}", 32, CPU)


def test_a_network_that_resizes_otherwise_is_another(
    tmp_path: Path, keep_rng: None, offline: None
) -> None:
    imported("torchvision", "torchvision", "timm")
    timm = imported("timm", "timm", "timm")
    with torch.random.fork_rng():
        network = timm.create_model("test_resnet", num_classes=7)
    file = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), file)
    about = "name: timm, model: test_resnet, mean: [0.5, 0.4, 0.3], std: [0.2, 0.3, 0.4]"
    digests = [
        network_digest(load_teacher(file, f"{{{about}, size: {size}}}", 32, CPU).model)
        for size in (32, 48, 48)
    ]
    assert digests[0] != digests[1]
    assert digests[1] == digests[2]


def test_names_of_classes_come_from_whichever_network_has_them(tiny: Tiny) -> None:
    """Weights of other packages have none."""
    shape, file = (1, SIDE, SIDE), Path("other.safetensors")
    bare, named = (Teacher(tiny.teacher, shape, names) for names in (tuple("0123"), CLASSES))
    assert alike(file, named, bare).classes == alike(file, bare, named).classes == CLASSES
    assert alike(file, bare, bare).classes == tuple("0123")
    wider = Teacher(tiny.teacher, (1, 16, 16), CLASSES)
    for other in (wider, Teacher(tiny.teacher, shape, tuple("012"))):
        with pytest.raises(
            ForeshotError, match=r"other.safetensors: expected \(1, 12, 12\) images"
        ):
            alike(file, other, named)


def test_a_directory_of_transformers_brings_its_class_names(tmp_path: Path, offline: None) -> None:
    imported("torchvision", "torchvision", "transformers")
    transformers = imported("transformers", "hf", "transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, id2label={0: "cat", 1: "dog", 2: "cow"},
        label2id={"cat": 0, "dog": 1, "cow": 2},
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config)
    network.save_pretrained(tmp_path / "vit")
    preparing = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "vit/preprocessor_config.json").write_text(json.dumps(preparing))
    teacher = load_teacher(tmp_path / "vit", "transformers", 16, CPU)
    assert teacher.classes == ("cat", "dog", "cow")
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.eval()(2 * x - 1).logits
        torch.testing.assert_close(teacher.model(x), expected)
