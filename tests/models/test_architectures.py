"""Networks have the published sizes, fit any image that is large enough, and start reproducibly."""

import pickle
from copy import deepcopy
from typing import cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from foreshot.errors import ForeshotError
from foreshot.models import (
    ARCHITECTURES,
    Ensemble,
    Quantized,
    ReusedHead,
    Timm,
    TorchVision,
    Transformers,
    build,
)
from foreshot.models.base import Architecture, channel_statistics
from foreshot.models.mobilenet import MobileNetV2
from foreshot.models.resnet import BasicBlock, ResidualNetwork, ResNet
from foreshot.models.shufflenet import ShuffleNetV2
from foreshot.models.vgg import Vgg
from foreshot.models.vit import Vit
from foreshot.models.wide_resnet import PreActivationBlock, WideResNet

SMALL: list[Architecture] = [
    ResNet(depth=8, width=0.5),
    ResNet(depth=8, width=0.5, stem_stride=2),
    WideResNet(width=1),
    Vgg(),
    MobileNetV2(width=0.25),
    ShuffleNetV2(size="x0.5"),
    Vit(dim=16, depth=4, heads=2),
    Quantized(of=ResNet(depth=8, width=0.5)),
]
COMPOSED = {Ensemble, ReusedHead}
"""Of several networks; test_composed.py is about them."""
FOREIGN = {Timm, TorchVision, Transformers}
"""Of other packages; test_adapters.py is about them."""
small = pytest.mark.parametrize("architecture", SMALL, ids=lambda a: f"{a.name}")


def pictures(*shape: int) -> Tensor:
    noise = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (ResNet(depth=20), 278_324),
        (ResNet(depth=56), 861_620),
        (ResNet(depth=8, width=4), 1_233_540),
        (ResNet(depth=32, width=4), 7_433_860),
        (WideResNet(depth=16, width=2), 703_284),
        (WideResNet(depth=40, width=2), 2_255_156),
        (Vgg(depth=8), 3_965_028),
        (Vgg(depth=13), 9_462_180),
        (MobileNetV2(width=0.5), 812_836),
        (ShuffleNetV2(size="x1"), 1_355_528),
    ],
    ids=str,
)
def test_sizes_are_the_published_ones(architecture: Architecture, expected: int) -> None:
    """As in the CIFAR-100 models of Tian et al. (2020)."""
    with torch.device("meta"):
        assert parameters(architecture.build((3, 32, 32), 100)) == expected


def test_small_list_covers_the_family() -> None:
    assert {type(architecture) for architecture in SMALL} | COMPOSED | FOREIGN == set(
        ARCHITECTURES.values()
    )


@small
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (4, 16, 24), (3, 64, 64)], ids=str)
def test_any_shape_runs_and_every_parameter_learns(
    architecture: Architecture, shape: tuple[int, int, int]
) -> None:
    model = build(architecture, pictures(4, *shape), classes=7, seed=0, key="x")
    logits = model(pictures(4, *shape) / 255)
    assert logits.shape == (4, 7)
    # Batch normalisation makes the plain sum blind to some parameters: weigh the logits.
    (logits * torch.linspace(-1, 2, 28).reshape(4, 7)).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias adds the same to all scores of a query, so that softmax ignores it.
    assert [name for name in silent if not name.endswith("qkv.bias")] == []


@pytest.mark.parametrize("architecture", SMALL[:-1], ids=lambda a: f"{a.name}")
@pytest.mark.parametrize("side", [32, 64])
def test_gradients_are_those_of_double_precision(architecture: Architecture, side: int) -> None:
    """Of all but quantised networks, which have none."""
    images = pictures(4, 3, side, side)
    model = build(architecture, images, classes=7, seed=0, key="x").eval()
    exact = deepcopy(model).double()
    for network, x in ((model, images / 255), (exact, images.double() / 255)):
        (network(x) * torch.linspace(-1, 2, 28).reshape(4, 7)).sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        error = (mine.grad - theirs.grad).norm()
        assert error <= 1e-3 * theirs.grad.norm() + 1e-6, name


@small
def test_each_image_is_judged_alone_in_eval_mode(architecture: Architecture) -> None:
    model = build(architecture, pictures(4, 3, 32, 32), classes=5, seed=0, key="x").eval()
    x = pictures(4, 3, 32, 32) / 255
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-4, atol=1e-5)


@small
def test_stages_run_in_order_under_their_names(architecture: Architecture) -> None:
    network = architecture.build((3, 32, 32), 5)
    stages = {name: m for name, m in network.named_children() if name.startswith("layer")}
    assert list(stages)[:3] == ["layer1", "layer2", "layer3"]
    fired = []
    for name, stage in stages.items():
        stage.register_forward_hook(lambda *_, name=name: fired.append(name))
    network(torch.rand(2, 3, 32, 32))
    assert fired == list(stages)


@small
def test_hooked_features_are_not_overwritten_by_later_layers(architecture: Architecture) -> None:
    """In-place activations must not change what feature distillation has taken."""
    network = architecture.build((3, 32, 32), 5)
    taken: list[tuple[Tensor, Tensor]] = []
    for name, stage in network.named_children():
        if name.startswith("layer"):
            stage.register_forward_hook(lambda *io: taken.append((io[2], io[2].clone())))
    network(torch.rand(2, 3, 32, 32))
    assert len(taken) >= 3
    assert all(torch.equal(now, then) for now, then in taken)


@small
def test_initialisation_depends_on_seed_and_key_alone(architecture: Architecture) -> None:
    def weights(seed: int, key: str, burn: int) -> Tensor:
        torch.manual_seed(burn)
        model = build(architecture, pictures(2, 3, 16, 16), classes=3, seed=seed, key=key)
        return nn.utils.parameters_to_vector(p.contiguous() for p in model.parameters())

    teacher = weights(0, "teacher", burn=1)
    assert torch.equal(teacher, weights(0, "teacher", burn=2))
    assert not torch.equal(teacher, weights(0, "student", burn=1))
    assert not torch.equal(teacher, weights(1, "teacher", burn=1))


def test_build_leaves_the_global_rng_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build(ResNet(depth=8), pictures(2, 1, 8, 8), classes=3, seed=0, key="x")
    assert torch.equal(torch.get_rng_state(), before)


def test_pixels_are_normalised_inside_the_model() -> None:
    images = pictures(50, 3, 8, 8)
    model = build(ResNet(depth=8), images, classes=3, seed=0, key="x")
    network = model.network
    model.network = nn.Identity()
    normal = model(images / 255)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        normal.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5, rtol=0
    )
    assert isinstance(network, ResidualNetwork)


def test_statistics_are_exact_and_a_flat_channel_divides_by_no_zero() -> None:
    images = torch.zeros(2, 2, 1, 2, dtype=torch.uint8)
    images[:, 1] = torch.tensor([[0, 255], [51, 102]]).reshape(2, 1, 2)
    mean, std = channel_statistics(images)
    torch.testing.assert_close(mean, torch.tensor([0.0, 0.4]))
    torch.testing.assert_close(std, torch.tensor([1e-3, (0.14) ** 0.5]))


@pytest.mark.parametrize(
    ("architecture", "side"),
    [
        (ResNet(depth=8), 4),
        (ResNet(depth=8, stem_stride=2), 8),
        (WideResNet(), 4),
        (Vgg(), 6),
        (MobileNetV2(), 16),
        (ShuffleNetV2(), 8),
        (Vit(), 4),
    ],
    ids=str,
)
def test_too_small_images_are_refused(architecture: Architecture, side: int) -> None:
    assert architecture.build((3, side, side), 2)(torch.rand(2, 3, side, side)).shape == (2, 2)
    with pytest.raises(
        ForeshotError, match=rf"at least {side} x {side} pixels, found 40 x {side - 1}"
    ):
        architecture.build((3, 40, side - 1), 2)


def test_vit_refuses_what_its_patches_and_heads_do_not_divide() -> None:
    with pytest.raises(ForeshotError, match=r"multiples of patch = 4, found 28 x 30"):
        Vit().build((1, 28, 30), 2)
    with pytest.raises(ValidationError, match="multiple of heads = 3"):
        Vit(dim=128, heads=3)


@pytest.mark.parametrize("depth", [3, 4, 5, 6])
def test_vit_shares_its_blocks_among_three_stages(depth: int) -> None:
    network = Vit(dim=16, depth=depth, heads=2).build((1, 8, 8), 2)
    lengths = [len(cast(nn.Sequential, network.get_submodule(f"layer{i}"))) for i in (1, 2, 3)]
    assert sum(lengths) == depth
    assert max(lengths) - min(lengths) <= 1


def test_vit_attention_is_that_of_the_reference_encoder() -> None:
    vit = Vit(dim=16, depth=3, heads=4).build((1, 8, 8), 2)
    block = cast(nn.Sequential, vit.get_submodule("layer1"))[0]
    reference = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "self_attn.in_proj_weight": "qkv.weight",
        "self_attn.in_proj_bias": "qkv.bias",
        "self_attn.out_proj.weight": "out.weight",
        "self_attn.out_proj.bias": "out.bias",
        "linear1.weight": "mlp.0.weight",
        "linear1.bias": "mlp.0.bias",
        "linear2.weight": "mlp.2.weight",
        "linear2.bias": "mlp.2.bias",
    }
    state = block.state_dict()
    for parameter in state.values():
        parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    reference.load_state_dict({n: state[names.get(n, n)] for n in reference.state_dict()})
    x = torch.rand(2, 5, 16)
    torch.testing.assert_close(block(x), reference(x), rtol=1e-4, atol=1e-4)


def test_residual_block_adds_its_input_before_the_last_activation() -> None:
    x = torch.linspace(-1, 1, 2 * 8 * 9).reshape(2, 8, 3, 3)
    block = BasicBlock(8, 8, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x.relu())
    block.bn2.bias.data.fill_(0.5)
    assert torch.equal(block(x), (x + 0.5).relu())


def test_preactivation_block_adds_its_input_as_it_is_unless_it_projects() -> None:
    x = torch.linspace(-1, 1, 2 * 8 * 9).reshape(2, 8, 3, 3)
    block = PreActivationBlock(8, 8, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x)
    wider = PreActivationBlock(8, 16, 2).eval()
    nn.init.zeros_(wider.conv2.weight)
    assert wider.projection is not None
    assert torch.equal(wider(x), wider.projection(wider.bn1(x).relu()))


def test_shuffle_interleaves_the_halves() -> None:
    x = torch.arange(8.0).reshape(1, 8, 1, 1).expand(2, 8, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    assert F.channel_shuffle(x, 2)[1, :, 2, 1].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(("side", "last"), [(8, 4), (16, 4), (28, 3), (32, 4), (64, 4), (96, 6)])
def test_vgg_pools_up_to_four_times_while_three_pixels_are_left(side: int, last: int) -> None:
    features: list[Tensor] = []
    network = Vgg().build((1, side, side), 2)
    network.get_submodule("layer5").register_forward_hook(lambda *io: features.append(io[2]))
    network.eval()(torch.rand(1, 1, side, side))
    assert features[0].shape[2:] == (last, last)


def test_resnet_widths_are_multiples_of_eight_on_a_stem_of_sixteen() -> None:
    def widths(width: float) -> list[int]:
        state = ResNet(depth=8, width=width).build((3, 8, 8), 2).state_dict()
        names = ["conv1.weight", *(f"layer{i}.0.conv1.weight" for i in (1, 2, 3))]
        return [len(state[name]) for name in names]

    assert widths(1) == [16, 16, 32, 64]
    assert widths(4) == [32, 64, 128, 256]
    assert widths(0.3) == [16, 8, 8, 16]
    assert widths(1.6) == [16, 24, 48, 104]


@small
def test_member_survives_pickling_and_json(architecture: Architecture) -> None:
    assert pickle.loads(pickle.dumps(architecture)) == architecture
    assert type(architecture).model_validate_json(architecture.model_dump_json()) == architecture
