"""CRD against plain loops and torchdistill; its draws, its memory, and what autograd sees of it."""

import math
from copy import deepcopy
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from conftest import signals
from foreshot.distillation import Signals
from foreshot.distillation.losses.crd import CRD, Memory, draw, nce

SAMPLES = 20
INDEX = torch.tensor([3, 17, 0, 8, 11])
NO_SALT = torch.tensor(0)


def made(**fields: Any) -> tuple[CRD, nn.ModuleList, Signals]:
    """A loss, what it learned, and a batch of five images."""
    loss = CRD(**{"dim": 6, "negatives": 9, "temperature": 0.125, **fields})
    pairs = [(signals(5, 4, count=1)[0].requires_grad_(), signals(5, 7, count=1, seed=1)[0])]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learned = loss.learn(pairs, SAMPLES).double()
    assert isinstance(learned, nn.ModuleList)
    return loss, learned, Signals(pairs, index=INDEX)


def memory_of(learned: nn.ModuleList) -> Memory:
    (memory,) = learned
    assert isinstance(memory, Memory)
    return memory


def embedded(memory: Memory, batch: Signals) -> list[Tensor]:
    with torch.no_grad():
        return [
            F.normalize(embed(x), dim=1)
            for embed, x in zip(memory.embed, batch.pairs[0], strict=True)
        ]


def splitmix64(count: int, start: int = 0, seed: int = 0) -> list[int]:
    """Steele et al. (2014), in Python's integers: outputs `start` to `start + count` of a seed."""
    numbers = []
    for i in range(start + 1, start + count + 1):
        x = (seed + i * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        numbers.append(x ^ x >> 31)
    return numbers


def by_hand(memory: Memory, batch: Signals, drawn: list[int], temperature: float) -> list[float]:
    """Both sides of the loss, and the logarithms of their Z, image by image."""
    anchors = [side.tolist() for side in embedded(memory, batch)]
    rows = memory.rows.tolist()
    losses, constants = [], []
    for side in (0, 1):
        exponentials = []
        for anchor, place in zip(anchors[side], INDEX.tolist(), strict=True):
            partners = [rows[1 - side][i] for i in [place, *drawn]]
            products = [sum(a * b for a, b in zip(anchor, row, strict=True)) for row in partners]
            exponentials.append([math.exp(s / temperature) for s in products])
        flat = [value for row in exponentials for value in row]
        z = sum(flat) / len(flat) * SAMPLES
        noise = len(drawn) / SAMPLES
        total = 0.0
        for positive, *negatives in exponentials:
            total -= math.log(positive / z / (positive / z + noise))
            total -= sum(math.log(noise / (value / z + noise)) for value in negatives)
        losses.append(total / len(exponentials))
        constants.append(math.log(z))
    return [sum(losses), *constants]


def test_it_is_the_formula() -> None:
    loss, learned, batch = made()
    memory = memory_of(learned)
    drawn = [number // 2 % SAMPLES for number in splitmix64(9, seed=int(memory.salt))]
    expected, *log_z = by_hand(memory, batch, drawn, 0.125)
    assert loss.value(batch, learned).item() == pytest.approx(expected, rel=1e-12)
    assert memory.log_z.tolist() == pytest.approx(log_z, rel=1e-12)


def test_it_is_torchdistills(torchdistill: ModuleType) -> None:
    """With the same negatives, memories and Z; two batches, so that both memories move alike."""
    loss, learned, batch = made()
    memory = memory_of(learned)
    oracle = torchdistill.CRDLoss("s", "e", "t", 6, SAMPLES, 9, SAMPLES, 0.125, 0.5, eps=0).double()
    oracle.memory_v1.copy_(memory.rows[0])
    oracle.memory_v2.copy_(memory.rows[1])
    for step in range(2):
        student, teacher = embedded(memory, batch)
        drawn = draw(memory.step, memory.salt, 9, SAMPLES).expand(5, 9)
        extra = {"pos_idx": INDEX, "contrast_idx": torch.cat((INDEX[:, None], drawn), 1)}
        student_io = {"s": {"output": student}, "e": {"input": extra}}
        theirs = oracle(student_io, {"t": {"output": teacher}})
        ours = loss.value(batch, learned)
        torch.testing.assert_close(ours, theirs.squeeze(), rtol=1e-10, atol=0)
        torch.testing.assert_close(memory.log_z.exp(), oracle.params[2:4], rtol=1e-10, atol=0)
        torch.testing.assert_close(memory.rows[0], oracle.memory_v1)
        torch.testing.assert_close(memory.rows[1], oracle.memory_v2)
        assert memory.step == step + 1
    # It cannot draw negatives itself.
    with pytest.raises(AttributeError):
        oracle.draw(3)


def test_the_published_setting_in_single_precision() -> None:
    """Sums over 16384 negatives at T = 0.07 stay exact to a hundred-thousandth."""
    values = []
    for dtype in (torch.float64, torch.float32):
        loss, learned, batch = made(negatives=16384, temperature=0.07)
        pairs = [(student.to(dtype), teacher.to(dtype)) for student, teacher in batch.pairs]
        value = loss.value(Signals(pairs, index=INDEX), learned.to(dtype))
        assert value.dtype == dtype
        values.append(value.item())
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_nce_by_hand() -> None:
    """Where e^u is m/M every guess is one half; and no score is too large."""
    noise = math.log(4 / 100)
    positive, negative = torch.full((3,), noise), torch.full((3, 4), noise)
    assert nce(positive, negative, 100).item() == pytest.approx(5 * math.log(2))
    certain = nce(torch.full((3,), 500.0), torch.full((3, 4), -500.0), 100)
    assert certain.item() == pytest.approx(0, abs=1e-12)
    wrong = nce(torch.full((3,), -500.0), torch.full((3, 4), 500.0), 100)
    assert wrong.item() == pytest.approx(500 + noise + 4 * (500 - noise))
    one, two = signals(5, 3)
    assert gradcheck(lambda u, v: nce(u[:, 0], v, 7), (one.requires_grad_(), two.requires_grad_()))


def test_negatives_are_those_of_splitmix64_and_uniform() -> None:
    assert splitmix64(1) == [0xE220A8397B1DCDAF]  # the published first number of seed 0
    for step in (0, 5, 10**12):
        expected = [number // 2 % 1000 for number in splitmix64(64, step * 64)]
        assert draw(torch.tensor(step), NO_SALT, 64, 1000).tolist() == expected
        expected = [number // 2 % 1000 for number in splitmix64(64, step * 64, 2**61 + 1)]
        assert draw(torch.tensor(step), torch.tensor(2**61 + 1), 64, 1000).tolist() == expected
    count, total = 4096, 50
    drawn = torch.stack([draw(torch.tensor(step), NO_SALT, count, total) for step in range(100)])
    assert drawn.min() == 0
    assert drawn.max() == total - 1
    size = count * 100
    chi_square = ((drawn.flatten().bincount() - size / total) ** 2 / (size / total)).sum()
    assert 20 < chi_square < 85  # 49 degrees of freedom: 3.6 standard deviations either way
    # Neither the next place nor the next step tells of a number: pairs are uniform as well.
    for one, other in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        pairs = (one * total + other).flatten().bincount(minlength=total**2).double()
        mean = pairs.mean()
        degrees = total**2 - 1
        assert abs(((pairs - mean) ** 2 / mean).sum() - degrees) < 4 * math.sqrt(2 * degrees)


def test_what_is_remembered_follows_the_embeddings_in_training_only() -> None:
    loss, learned, batch = made(momentum=0.25)
    memory = memory_of(learned)
    before = deepcopy(memory.state_dict())
    learned.eval()
    unseen = loss.value(batch, learned)
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())
    learned.train()
    assert torch.equal(loss.value(batch, learned), unseen)
    moved = 0.25 * before["rows"][:, INDEX] + 0.75 * torch.stack(embedded(memory, batch))
    torch.testing.assert_close(memory.rows[:, INDEX], F.normalize(moved, dim=2))
    others = [i for i in range(SAMPLES) if i not in INDEX]
    assert torch.equal(memory.rows[:, others], before["rows"][:, others])
    torch.testing.assert_close(memory.rows.norm(dim=2), torch.ones(2, SAMPLES).double())
    assert memory.step == 1
    first = memory.log_z.clone()
    loss.value(batch, learned)
    assert torch.equal(memory.log_z, first)
    assert memory.step == 2
    buffers = {name for name, _ in memory.named_buffers()}
    assert buffers == {"rows", "log_z", "step", "salt"}


def test_a_resumed_training_is_the_same() -> None:
    loss, learned, batch = made()
    loss.value(batch, learned)
    _, resumed, _ = made()
    assert not torch.equal(
        loss.value(batch, deepcopy(resumed)), loss.value(batch, deepcopy(learned))
    )
    resumed.load_state_dict(learned.state_dict())
    for _ in range(3):
        assert torch.equal(loss.value(batch, resumed), loss.value(batch, learned))


def test_several_forwards_before_a_backward_give_the_sum_of_the_gradients() -> None:
    loss, learned, batch = made()
    loss.value(batch, learned)
    other = Signals(batch.pairs, index=INDEX.flip(0))
    twin = deepcopy(learned)
    apart = []
    for part in (batch, other, batch):
        apart.append(torch.autograd.grad(loss.value(part, twin), list(twin.parameters())))
    together = torch.stack([loss.value(part, learned) for part in (batch, other, batch)]).sum()
    for gradient, *parts in zip(
        torch.autograd.grad(together, list(learned.parameters())), *apart, strict=True
    ):
        torch.testing.assert_close(gradient, torch.stack(parts).sum(0))
        assert gradient.abs().max() > 0


def test_its_gradient_is_right() -> None:
    loss, learned, batch = made()
    loss.value(batch, learned)  # Z is settled
    learned.eval()
    ((student, teacher),) = batch.pairs
    assert gradcheck(lambda s: loss.value(Signals([(s, teacher)], index=INDEX), learned), student)


def test_an_image_is_known_by_its_own_memory() -> None:
    """The loss is least where each image meets its own teacher, not another's."""
    loss, learned, _ = made(dim=4, momentum=0)
    memory = memory_of(learned)
    with torch.no_grad():
        embedding = F.normalize(signals(SAMPLES, 4, count=1)[0], dim=1)
        memory.rows.copy_(embedding.expand(2, -1, -1))
        memory.embed = nn.ModuleList([nn.Identity(), nn.Identity()])
        features = [(embedding[INDEX], embedding[INDEX])]
        right = loss.value(Signals(features, index=INDEX), deepcopy(learned))
        wrong = loss.value(Signals(features, index=INDEX.roll(1)), deepcopy(learned))
    assert right + 1 < wrong
