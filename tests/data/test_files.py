import hashlib
import io
import lzma
import struct
import zlib
from contextlib import suppress
from email.message import Message
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from foreshot.data import files
from foreshot.errors import ForeshotError

URL = "https://example.org/images.gz"
DIGEST = "sha256:" + hashlib.sha256(b"content").hexdigest()


class Response(io.BytesIO):
    headers = Message()


@pytest.fixture
def online(monkeypatch):
    """Stands in for the network: a list of the URLs asked for, which all hold b"content"."""
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> Response:
        asked.append(url)
        return Response(b"content")

    monkeypatch.setattr(files, "urlopen", urlopen)
    return asked


def test_fetch_downloads_once(tmp_path, online) -> None:
    target = tmp_path / "deep" / "images.gz"
    for _ in range(2):
        assert files.fetch(URL, DIGEST, target) == target
    assert target.read_bytes() == b"content"
    assert online == [URL]
    assert list(target.parent.iterdir()) == [target]


def test_a_wrong_download_leaves_nothing_behind(tmp_path, online) -> None:
    with pytest.raises(ForeshotError, match=f"{URL}: expected sha256 0000, found"):
        files.fetch(URL, "sha256:0000", tmp_path / "images.gz")
    assert list(tmp_path.iterdir()) == []


def test_a_download_has_a_limit(tmp_path, online, monkeypatch) -> None:
    monkeypatch.setattr(files, "LARGEST_DOWNLOAD", 6)
    with pytest.raises(ForeshotError, match="at most 6 bytes"):
        files.fetch(URL, DIGEST, tmp_path / "images.gz")
    assert list(tmp_path.iterdir()) == []


def test_offline_says_which_file_goes_where(tmp_path, monkeypatch) -> None:
    def urlopen(url: str, timeout: float) -> Response:
        raise URLError("no route to host")

    monkeypatch.setattr(files, "urlopen", urlopen)
    target = tmp_path / "images.gz"
    with pytest.raises(ForeshotError) as raised:
        files.fetch(URL, DIGEST, target)
    assert str(raised.value).startswith(f"{target}: ")
    assert "no route to host" in str(raised.value)
    assert URL in str(raised.value)


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_digests_of_bytes_and_of_files(tmp_path, algorithm) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    digest = f"{algorithm}:{hashlib.new(algorithm, b'content').hexdigest()}"
    files.check_digest(path, digest, "it")
    files.check_digest(b"content", digest, "it")
    for content in (path, b"Content"):
        with pytest.raises(ForeshotError, match=f"it: expected {algorithm} 00, found "):
            files.check_digest(content, f"{algorithm}:00", "it")


def test_content_up_to_the_limit_is_unpacked(tmp_path) -> None:
    path = tmp_path / "file.xz"
    path.write_bytes(lzma.compress(b"12345"))
    assert files.decompress(path, 5) == b"12345"
    with pytest.raises(ForeshotError, match="at most 4 bytes"):
        files.decompress(path, 4)


def test_a_failed_write_keeps_the_old_file(tmp_path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with suppress(ZeroDivisionError), files.replacing(target) as part:
        part.write_bytes(b"half of the n")
        raise ZeroDivisionError
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def test_only_the_allowed_formats_are_tried() -> None:
    content = encoded(Image.new("RGB", (2, 2)), "BMP")
    with pytest.raises(ForeshotError, match="x: expected a whole PNG or JPEG image"):
        files.read_picture(content, ("PNG", "JPEG"), "x")
    assert files.read_picture(content, ("BMP",), "x").size == (2, 2)


def test_pictures_have_a_limit(monkeypatch) -> None:
    content = encoded(Image.new("1", (100, 50)), "PNG")
    monkeypatch.setattr(files, "LARGEST_PICTURE", 4999)
    with pytest.raises(ForeshotError, match="x: expected at most 4999 pixels, found 5000"):
        files.read_picture(content, ("PNG",), "x")


@pytest.mark.parametrize("limit", [4999, 2499])
def test_a_bomb_by_the_measure_of_pillow_is_refused(monkeypatch, limit) -> None:
    # Pillow warns of images above this number and refuses those of twice as many pixels.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    content = encoded(Image.new("1", (100, 50)), "PNG")
    with pytest.raises(ForeshotError, match="decompression bomb"):
        files.read_picture(content, ("PNG",), "x")


def test_animations_are_refused_but_not_photographs_with_extras() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    with pytest.raises(ForeshotError, match="x: expected a still image, found 2 frames"):
        files.read_picture(animation, ("PNG",), "x")
    photograph = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    picture = files.read_picture(photograph, ("JPEG",), "x")
    red, _, blue = picture.convert("RGB").resize((1, 1)).tobytes()
    assert red > 200
    assert blue < 50


def test_pictures_are_turned_upright() -> None:
    picture = Image.new("L", (2, 1))
    picture.putpixel((0, 0), 200)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the stored picture
    upright = files.read_picture(encoded(picture, "PNG", exif=exif), ("PNG",), "x")
    assert upright.size == (1, 2)
    assert upright.tobytes() == bytes([200, 0])


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "P", "CMYK", "1"])
def test_a_picture_is_the_same_in_one_strip_and_in_many(mode, monkeypatch) -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (7, 13), dtype=np.uint16)
    colours = Image.fromarray(levels.view(np.uint8).reshape(7, 13, 2)[..., :1].repeat(4, 2), "RGBA")
    picture = Image.fromarray(levels) if mode == "I;16" else colours.convert(mode)
    stream = io.BytesIO()
    kind = "JPEG" if mode == "CMYK" else "PNG"
    picture.save(stream, kind)
    whole = np.array(files.read_picture(stream.getvalue(), (kind,), "it"))
    monkeypatch.setattr(files, "STRIP", 20)
    assert (np.array(files.read_picture(stream.getvalue(), (kind,), "it")) == whole).all()
    if mode == "I;16":
        assert (whole == np.round(levels / 257)).all()
    if mode == "RGBA":
        alpha = np.array(picture)[..., 3:] / 255
        expected = alpha * np.array(picture)[..., :3] + (1 - alpha) * 255
        assert np.abs(whole - expected).max() <= 1


def test_a_colour_that_the_palette_lacks_is_answered() -> None:
    stream = io.BytesIO()
    Image.new("P", (4, 4)).save(stream, "PNG", transparency=bytes(4))
    chunk = b"tRNS" + bytes(300)
    content = stream.getvalue()
    place = content.index(b"tRNS") - 4
    (size,) = struct.unpack(">I", content[place : place + 4])
    broken = struct.pack(">I", 300) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ForeshotError, match="it: expected a whole PNG image, found palette index"):
        files.read_picture(content[:place] + broken + content[place + 12 + size :], ("PNG",), "it")
