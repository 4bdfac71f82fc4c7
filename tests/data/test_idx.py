import gzip
import struct

import pytest
import torch

from foreshot.data.files import decompress
from foreshot.data.idx import read_idx, write_idx
from foreshot.errors import ForeshotError


def test_values_lie_where_the_format_says() -> None:
    data = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 10, 20, 30, 40, 50, 255])
    values = read_idx(data, "tiny")
    assert values.tolist() == [[[10, 20, 30]], [[40, 50, 255]]]
    assert values.dtype == torch.uint8
    assert write_idx(values) == data


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "00 00 08"),
        (b"\0\0\x08", "00 00 08"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "00 00 08"),
        (b"\0\x01\x08\x01\0\0\0\x01\0", "00 00 08"),
        (b"\0\0\x08\0", "00 00 08"),
        (b"\0\0\x08\x02\0\0\0\x01", "header of 12 bytes, found 8"),
        (b"\0\0\x08\x01\0\0\0\x03\x01\x02", r"3 values \(3,\), found 2"),
        (b"\0\0\x08\x01\0\0\0\x01\x01\x02", r"1 values \(1,\), found 2"),
        (b"\0\0\x08\xff" + b"\xff" * 1020, "found 0"),
    ],
)
def test_what_is_not_idx_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(ForeshotError, match=f"labels.gz: .*{complaint}"):
        read_idx(data, "labels.gz")


def test_a_bomb_is_not_unpacked(tmp_path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 9) + bytes(50_000_000)))
    with pytest.raises(ForeshotError, match=r"bomb.gz: expected at most 17 bytes"):
        decompress(path, 17)
