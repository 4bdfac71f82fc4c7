"""Image classifiers of Hugging Face transformers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator

from foreshot.errors import ForeshotError, nearest
from foreshot.extras import imported
from foreshot.files import read_json
from foreshot.models.foreign import Bare, Foreign, check_names, check_shape, digest, is_blank

TINY = {
    "model_type": "vit",
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
REFUSED = {"auto_map", "attn_implementation", "_attn_implementation", "quantization_config"}
"""Keys of a config, at any depth, by which transformers may run code from elsewhere."""
LABELS = {"id2label", "label2id", "num_labels", "dtype", "torch_dtype"}
"""Keys of a config that foreshot decides itself."""


class Transformers(Foreign):
    """Image classifier of Hugging Face transformers, from a config or from a local directory.

    `weights` is a directory as `save_pretrained` writes it: config.json, model.safetensors and
    preprocessor_config.json, of which config, mean and std are taken. No code of a repository runs,
    and keys of a config that ask for such are passed over.

    Args:
        config: JSON (or, in a config of foreshot, a mapping) of what a config.json holds; its
            image_size is what images are resized to where `size` is None.
    """

    name: Literal["transformers"] = "transformers"
    config: str = json.dumps(TINY)

    package: ClassVar[str] = "transformers"
    extra: ClassVar[str] = "hf"

    @field_validator("config", mode="before")
    @classmethod
    def _write_json(cls, config: Any) -> Any:
        return json.dumps(config) if isinstance(config, dict) else config

    @field_validator("config")
    @classmethod
    def _read_json(cls, config: str) -> str:
        try:
            fields = json.loads(config)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected JSON ({error})") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
            raise ValueError("expected a JSON object with a model_type")
        return config

    @classmethod
    def described(cls, weights: Path) -> dict[str, Any]:
        fields = {
            "digest": digest(weights / "model.safetensors"),
            "config": read_json(weights / "config.json"),
        }
        preparing = weights / "preprocessor_config.json"
        if not preparing.exists():
            return fields
        prepared = read_json(preparing)
        if not isinstance(prepared, dict):
            raise ForeshotError(f"{preparing}: expected a JSON object, found another value")
        for key in ("do_flip_channel_order", "rescale_offset"):
            if prepared.get(key):
                raise ForeshotError(
                    f"{preparing}: expected pixels in [0, 1], red first, found {key}"
                )
        plain = {"image_mean": (0,), "image_std": (1,)}
        prepared = prepared if prepared.get("do_normalize", True) else plain
        return fields | {"mean": prepared.get("image_mean"), "std": prepared.get("image_std")}

    def bare(self, package: ModuleType, channels: int, classes: int) -> Bare:  # noqa: ARG002
        if self.weights is not None and self.mean is None:
            raise ForeshotError(
                f"{self.weights}: expected a preprocessor_config.json with image_mean and "
                "image_std, or the keys mean and std, found neither"
            )
        fields = json.loads(self.config, object_hook=_plain)
        kinds = package.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        with suppress(ForeshotError):  # transformers takes what is imported already
            imported("torchvision", "torchvision", self.title)
        # A wrapped timm model may be looked up on the net; the model timm does without.
        kinds = [kind for kind in kinds if kind != "timm_wrapper"]
        if fields["model_type"] not in kinds:
            hint = nearest(fields["model_type"], kinds)
            raise ForeshotError(f"{self.title}: found model_type {fields['model_type']!r}; {hint}")
        # Of a kind with several classifiers, transformers takes the first where none is named.
        config = package.AutoConfig.for_model(**{"architectures": []} | fields, num_labels=classes)
        auto, dtype = package.AutoModelForImageClassification, torch.float32
        if self.weights is None or is_blank():
            network = auto.from_config(config, dtype=dtype, trust_remote_code=False)
        else:
            with _quiet(package):
                network, report = auto.from_pretrained(
                    self.weights,
                    config=config,
                    dtype=dtype,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            check_names(self.weights, report["missing_keys"], report["unexpected_keys"])
            for name, found, expected in sorted(report["mismatched_keys"]):
                check_shape(self.weights, name, expected, found, classes)
        size = self.size or getattr(config, "image_size", None)
        size = size if size is None or isinstance(size, int) else tuple(size)
        return Bare(network, getattr(config, "num_channels", 3), size)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in REFUSED | LABELS}


@contextmanager
def _quiet(package: ModuleType) -> Iterator[None]:
    """Without the progress bar and the report: what does not fit becomes an error of ours."""
    logging = package.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
