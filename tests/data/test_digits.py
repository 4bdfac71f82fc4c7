from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from foreshot.data.digits import Digits


def test_every_fifth_image_of_a_class_is_tested() -> None:
    train, test = Digits().load(Path())
    images, targets = map(np.asarray, load_digits(return_X_y=True))
    source = torch.from_numpy(images).reshape(-1, 1, 8, 8)
    assert train.labels is not None
    assert test.labels is not None
    for label in range(10):
        scaled = (source[targets == label] * 255 / 16).round().to(torch.uint8)
        tested = torch.arange(len(scaled)) % 5 == 4
        assert torch.equal(test.images[test.labels == label], scaled[tested])
        assert torch.equal(train.images[train.labels == label], scaled[~tested])
    assert (len(train), len(test)) == (1442, 355)
    assert int(train.images.max()) == 255
    assert int(train.images.min()) == 0
