"""What is pruned stays pruned; what is quantised is what integers would compute."""

from copy import deepcopy
from pathlib import Path
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import ARCHITECTURE, Tiny
from foreshot.compression import COMPRESSIONS, Compression, Prune, Quantize
from foreshot.compute import CPU
from foreshot.distillation import KD, Distiller, Term
from foreshot.inference import logits
from foreshot.models import Ensemble, Quantized, build, quantized
from foreshot.models.base import Normalized
from foreshot.models.checkpoint import load_model, network_digest, save_model, state_digest
from foreshot.models.ensemble import members
from foreshot.models.quantized import Range, Rounded
from foreshot.training import Samples, Training, fit


def recovered(tiny: Tiny, compression: Compression, epochs: int = 2) -> Normalized:
    student = compression.start(tiny.teacher)
    distiller = Distiller(student, tiny.teacher, [Term(KD())])
    schedule = Training(epochs=epochs, batch=40, lr=0.05)
    fit(distiller, Samples(tiny.train.images), schedule, CPU, seed=0, stage="student")
    compression.finish(student)
    return student


def accuracy(model: nn.Module, tiny: Tiny) -> float:
    said = logits(model, tiny.test.images, CPU).argmax(1)
    return (said == tiny.test.labels).float().mean().item()


@pytest.mark.parametrize("key", COMPRESSIONS)
def test_a_compressed_teacher_is_trained_saved_and_leaves_the_teacher_alone(
    key: str, tiny: Tiny, tmp_path: Path, keep_rng: None
) -> None:
    compression = COMPRESSIONS[key].model_validate({})
    before = state_digest(tiny.teacher)
    student = recovered(tiny, compression)
    assert state_digest(tiny.teacher) == before
    assert accuracy(student, tiny) > 0.9
    architecture = compression.architecture(ARCHITECTURE)
    save_model(tmp_path / "m", student, architecture, tiny.train.shape, tiny.train.classes)
    loaded = load_model(tmp_path / "m")
    assert loaded.architecture == architecture
    said = logits(student, tiny.test.images, CPU)
    torch.testing.assert_close(logits(loaded.model, tiny.test.images, CPU), said)


def layers(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_the_smallest_weights_are_zero_and_stay_so(tiny: Tiny) -> None:
    pruned = recovered(tiny, Prune(amount=0.6))
    before = torch.cat([layer.weight.flatten() for layer in layers(tiny.teacher)]).abs()
    after = torch.cat([layer.weight.flatten() for layer in layers(pruned)])
    assert (after == 0).float().mean().item() == pytest.approx(0.6, abs=1e-4)
    assert before[after == 0].max() <= before[after != 0].min()
    assert set(pruned.state_dict()) == set(tiny.teacher.state_dict())


def test_the_smallest_filters_of_each_convolution_are_zero(tiny: Tiny) -> None:
    pruned = recovered(tiny, Prune(amount=0.5, structure="filters"))
    first, *convolutions = [m for m in layers(pruned) if isinstance(m, nn.Conv2d)]
    assert first.weight.flatten(1).any(1).all()
    originals = [m for m in layers(tiny.teacher) if isinstance(m, nn.Conv2d)][1:]
    for layer, original in zip(convolutions, originals, strict=True):
        kept, norms = layer.weight.flatten(1).any(1), original.weight.flatten(1).abs().sum(1)
        assert kept.float().mean() == 0.5
        assert norms[~kept].max() <= norms[kept].min()
    assert layers(pruned)[-1].weight.ne(0).all()


def test_each_member_of_an_ensemble_is_pruned_alike(tiny: Tiny) -> None:
    teacher = build(Ensemble(of=ARCHITECTURE, count=2), tiny.train.images, 4, 0, "teacher")
    compression = Prune(amount=0.5, structure="filters")
    pruned = compression.start(teacher)
    compression.finish(pruned)
    kept = [
        [float(layer.weight.flatten(1).any(1).float().mean()) for layer in layers(member)]
        for member in members(pruned)
    ]
    assert kept[0] == kept[1] == [1.0, *[0.5] * (len(kept[0]) - 2), 1.0]


def levels(x: Tensor, scale: Tensor, zero: Tensor | float, low: int, high: int) -> Tensor:
    return ((x / scale).round() + zero).clamp(low, high)


def test_a_quantised_layer_is_what_integers_compute(tiny: Tiny) -> None:
    """Integer sums, scaled once at the end: what an int8 kernel does."""
    student = recovered(tiny, Quantize(bits=8), epochs=1).eval()
    caught: dict[str, tuple[Tensor, Tensor]] = {}
    names = ("network.layer2.0.conv1", "network.fc")
    for name in names:
        student.get_submodule(name).register_forward_hook(
            lambda _m, inputs, output, name=name: caught.update({name: (inputs[0], output)})
        )
    wrapped = {}
    for name in names:  # the input before it is rounded
        layer = student.get_submodule(name)
        layer.get_submodule("input").register_forward_hook(
            lambda _m, inputs, _o, name=name: wrapped.update({name: inputs[0]})
        )
    student(tiny.test.images[:16] / 255)
    for name in names:
        layer = student.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        weight = layer.parametrizations.weight.original.detach()  # type: ignore[union-attr,index]
        seen = layer.get_submodule("input")
        assert isinstance(seen, Range)
        scale = (seen.high - seen.low) / 255
        zero = (-seen.low / scale).round()
        steps = weight.flatten(1).abs().amax(1) / 127
        shape = (-1, *(1,) * (weight.dim() - 1))
        integers = levels(weight, steps.view(shape), 0, -127, 127).double()
        x = (levels(wrapped[name], scale, zero, 0, 255) - zero).double()
        if isinstance(layer, nn.Conv2d):
            sums = F.conv2d(x, integers, None, layer.stride, layer.padding)
            expected = sums * (scale * steps).double().view(1, -1, 1, 1)
        else:
            assert layer.bias is not None
            expected = (x @ integers.T) * (scale * steps).double() + layer.bias.double()
        torch.testing.assert_close(caught[name][1].double(), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(Quantize().architecture(ARCHITECTURE), Quantized)


def test_rounding_lets_gradients_through_where_it_does_not_clip() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.3]], requires_grad=True)
    Rounded(3)(weight).sum().backward()
    assert torch.equal(Rounded(3)(weight).detach()[0, 0], torch.tensor(1.0))
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 1, 1]]
    seen = Range(8)
    x = torch.tensor([-1.0, 0.0, 3.0])
    first = seen(x)
    assert (seen.low, seen.high) == (-1, 3)
    torch.testing.assert_close(first, x, rtol=0, atol=4 / 255)
    assert first[1] == 0  # zero, which padding is made of, is exact
    seen(2 * x)
    torch.testing.assert_close(seen.high, torch.tensor(3.15))
    seen.eval()
    wide = (10 * x).requires_grad_()
    seen(wide).sum().backward()
    assert wide.grad is not None
    assert wide.grad.tolist() == [0, 1, 0]
    assert seen.high == torch.tensor(3.15)


def test_a_quantised_network_is_known_again_by_another_process(tiny: Tiny) -> None:
    def digest(bits: int) -> str:
        return network_digest(Quantize(bits=bits).start(tiny.teacher))

    before = digest(8)
    assert digest(4) != before
    hook = quantized._round_input
    with pytest.MonkeyPatch.context() as patched:  # at another address, as in another process
        again = FunctionType(hook.__code__, hook.__globals__, hook.__name__)
        again.__qualname__ = hook.__qualname__
        patched.setattr(quantized, "_round_input", again)
        assert digest(8) == before


def test_fewer_bits_say_less(tiny: Tiny) -> None:
    said = logits(tiny.teacher, tiny.test.images, CPU)
    distances = []
    for bits in (8, 4, 2):
        student = Quantize(bits=bits).start(tiny.teacher)
        with torch.no_grad():
            student.train()(tiny.train.images / 255)  # sees the ranges
            for name, buffer in tiny.teacher.named_buffers():
                student.get_buffer(name).copy_(buffer)  # but keeps BatchNorm's statistics
        distances.append((logits(deepcopy(student), tiny.test.images, CPU) - said).abs().mean())
    assert distances[0] < 0.1 < distances[1] < distances[2]
