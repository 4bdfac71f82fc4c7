"""Networks of other packages as teachers of an audit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from foreshot.audit.teacher import load_teacher
from foreshot.compute import CPU
from foreshot.errors import ForeshotError
from foreshot.extras import imported


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
    with pytest.raises(ForeshotError, match="expected weights of model timm that differ"):
        load_teacher(tmp_path / "weights.safetensors", "{name: timm, model: resnet18}", 32, CPU)


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
