"""Every random choice comes from a generator derived from the seed and its purpose."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch

Key = str | int


def generator(seed: int, *keys: Key) -> torch.Generator:
    """A CPU generator that depends on `seed` and `keys` alone.

    Args:
        seed: the experiment's seed.
        keys: what the randomness is for, such as a stage, an epoch or a sample index.
    """
    return torch.Generator().manual_seed(derived(seed, *keys))


def derived(seed: int, *keys: Key) -> int:
    """A seed for somebody who must not know that of the experiment, signed, of 64 bits."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in (seed, *keys))
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@contextmanager
def drawing(seed: int, *keys: Key, device: torch.device | None = None) -> Iterator[None]:
    """Within, what draws from torch's global generators is seeded; they are left as they were.

    For what takes no generator: initialisers, and layers such as dropout.

    Args:
        seed: the experiment's seed.
        keys: what the randomness is for.
        device: where it is drawn beside the CPU, if elsewhere.
    """
    there = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=there):
        torch.set_rng_state(generator(seed, *keys).get_state())
        for each in there:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(derived(seed, *keys))
        yield
