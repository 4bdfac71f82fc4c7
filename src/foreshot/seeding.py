"""Every random choice comes from a generator derived from the seed and its purpose."""

from hashlib import blake2b

import torch

Key = str | int


def generator(seed: int, *keys: Key) -> torch.Generator:
    """A CPU generator that depends on `seed` and `keys` alone.

    Args:
        seed: the experiment's seed.
        keys: what the randomness is for, such as a stage, an epoch or a sample index.
    """
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in (seed, *keys))
    digest = blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
