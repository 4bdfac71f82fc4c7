"""The handwritten digits that come with scikit-learn."""

from pathlib import Path
from typing import Literal

import torch

from foreshot.data.base import Dataset, ImageSet, Splits

EVERY = 5


class Digits(Dataset):
    """Digits: 1,442 + 355 tiny grey images of handwritten digits, 8 x 8, 10 classes.

    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, as scikit-learn's
    `load_digits` gives it, with its levels 0 to 16 spread over 0 to 255. Every fifth image of a
    class, in file order, is a test image.
    """

    name: Literal["digits"] = "digits"

    def load(self, cache: Path) -> Splits:  # noqa: ARG002
        from sklearn.datasets import load_digits

        values, targets = load_digits(return_X_y=True)
        images = (torch.from_numpy(values).reshape(-1, 1, 8, 8) * 255 / 16).round().to(torch.uint8)
        labels = torch.from_numpy(targets).to(torch.int64)
        whole = ImageSet(images, labels, tuple("0123456789"))
        rank = torch.zeros_like(labels)
        for label in range(10):
            mine = labels == label
            rank[mine] = torch.arange(int(mine.sum()))
        tested = rank % EVERY == EVERY - 1
        return Splits(whole.select(~tested), whole.select(tested))
