import hashlib
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from foreshot.data.gtsrb import CLASSES, Gtsrb
from foreshot.errors import ForeshotError

HEAD = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n"


def ppm(width: int, height: int, box: tuple[int, int, int, int], colour: int) -> bytes:
    """A white picture, with the box filled by one colour, as binary PPM."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = [colour, colour + 1, colour + 2]
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()


def write(folder, monkeypatch, **changes: bytes) -> dict[str, dict[str, bytes]]:
    """The three archives in their official layout, with one picture for each class."""
    train: dict[str, bytes] = {}
    for label in range(43):
        path = f"GTSRB/Final_Training/Images/{label:05d}"
        train[f"{path}/00000_00000.ppm"] = ppm(29, 30, (5, 6, 24, 25), label)
        row = f"00000_00000.ppm;29;30;5;6;24;25;{label}\r\n"
        train[f"{path}/GT-{label:05d}.csv"] = (HEAD + row).encode()
    test = {f"GTSRB/Final_Test/Images/0000{i}.ppm": ppm(20, 40, (1, 2, 9, 34), i) for i in (0, 1)}
    truth = HEAD + "00000.ppm;20;40;1;2;9;34;16\r\n00001.ppm;20;40;1;2;9;34;1\r\n"
    archives = {
        "GTSRB_Final_Training_Images.zip": train,
        "GTSRB_Final_Test_Images.zip": test,
        "GTSRB_Final_Test_GT.zip": {"GT-final_test.csv": truth.encode()},
    }
    folder.mkdir()
    digests = {}
    for file, members in archives.items():
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, changes.get(member.split("/")[-1], content))
        (folder / file).write_bytes(stream.getvalue())
        digests[file] = "md5:" + hashlib.md5(stream.getvalue()).hexdigest()
    monkeypatch.setattr(Gtsrb, "archives", digests)
    return archives


def test_signs_are_cut_to_their_box_and_resized(tmp_path, monkeypatch) -> None:
    write(tmp_path / "gtsrb", monkeypatch)
    train, test = Gtsrb(size=16).load(tmp_path)
    assert train.labels is not None
    assert test.labels is not None
    assert train.labels.tolist() == list(range(43))
    assert test.labels.tolist() == [16, 1]
    assert train.images.shape == (43, 3, 16, 16)
    for label in (0, 42):  # no white of the surround, in any pixel
        assert train.images[label].unique().tolist() == [label, label + 1, label + 2]
        assert (train.images[label, 1] == label + 1).all()
    assert test.images[1].flatten(1).unique(dim=1).tolist() == [[1], [2], [3]]
    assert len(set(CLASSES)) == 43
    assert CLASSES[14] == "stop"
    assert CLASSES[40] == "roundabout mandatory"


def test_a_wrong_archive_is_refused(tmp_path, monkeypatch) -> None:
    write(tmp_path / "gtsrb", monkeypatch)
    path = tmp_path / "gtsrb" / "GTSRB_Final_Test_GT.zip"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ForeshotError, match=f"{path}: expected md5"):
        Gtsrb().load(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"00000.ppm": b"P6\n20 40\n255\n123"}, "Images/00000.ppm: expected a whole PPM image"),
        ({"00000.ppm": ppm(8, 8, (0, 0, 8, 8), 0)}, "expected a box inside .8, 8."),
        (
            {"GT-00007.csv": b"Filename;Width\r\na.ppm;2\r\n"},
            "GT-00007.csv, line 2: expected a row",
        ),
        ({"GT-00007.csv": HEAD.encode() + b"b.ppm;9;9;0;0;9;9;7"}, "no item named .*b.ppm"),
        (
            {"GT-final_test.csv": HEAD.encode() + b"00000.ppm;20;40;1;2;9;34;43"},
            "0 to 42, found 43",
        ),
    ],
)
def test_broken_members_are_named(tmp_path, monkeypatch, change, complaint) -> None:
    write(tmp_path / "gtsrb", monkeypatch, **change)
    with pytest.raises(ForeshotError, match=complaint):
        Gtsrb().load(tmp_path)


def test_no_other_format_than_ppm(tmp_path, monkeypatch) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (20, 40)).save(stream, "PNG")
    write(tmp_path / "gtsrb", monkeypatch, **{"00001.ppm": stream.getvalue()})
    with pytest.raises(ForeshotError, match=r"Images/00001\.ppm: expected a whole PPM"):
        Gtsrb().load(tmp_path)
