"""Makes the balanced tenth of Fashion-MNIST that the package carries, from the original files.

    python scripts/make_fashion_mnist_10k.py [folder] [--cache folder]

Takes the first images of each class in the order of the original files, writes four idx files
under xz, and ends with an error if their content is not what the loader expects.
"""

import argparse
import json
import lzma
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from foreshot.data.fashion_mnist import EMBEDDED, FULL, SUBSET, find
from foreshot.data.idx import write_idx


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the first `count` samples of every class."""
    firsts = [(labels == label).nonzero().flatten()[:count] for label in labels.unique()]
    return torch.cat(firsts).sort().values


def main() -> None:
    """Writes the files and the digests of what they hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", nargs="?", type=Path, default=EMBEDDED)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/foreshot").expanduser())
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    digests: dict[str, dict[str, str]] = {"source": {}, "subset": {}}
    for full, subset in zip(FULL, SUBSET, strict=True):
        source = full.read(*(find(file, arguments.cache) for file in full.files))
        assert source.labels is not None
        kept = first_of_each_class(source.labels, subset.count // len(source.classes))
        contents = source.images[kept, 0], source.labels[kept].to(torch.uint8)
        digests["source"] |= dict(zip(full.files, (full.images, full.labels), strict=True))
        for file, values in zip(subset.files, contents, strict=True):
            content = write_idx(values)
            (arguments.folder / f"{file}.xz").write_bytes(lzma.compress(content, preset=9))
            digests["subset"][file] = sha256(content).hexdigest()

    about = {
        "from": "https://github.com/zalandoresearch/fashion-mnist",
        "kept": "the first 1,000 training and 200 test images of each class, in file order",
        "digests": "SHA-256 of the idx files, decompressed",
        **digests,
    }
    (arguments.folder / "digests.json").write_text(json.dumps(about, indent=2) + "\n")
    expected = {
        file: digest
        for half in SUBSET
        for file, digest in zip(half.files, (half.images, half.labels), strict=True)
    }
    if digests["subset"] != expected:
        raise SystemExit(f"expected {expected}, found {digests['subset']}")


if __name__ == "__main__":
    main()
