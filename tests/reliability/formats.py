"""The loaders, whole files for them, and mutations that know the format."""

import gzip
import hashlib
import io
import json
import lzma
import random
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from foreshot.config import dump, load_config, parse, presets
from foreshot.data.base import ImageSet, Splits
from foreshot.data.cifar import Cifar10, read_records
from foreshot.data.files import decompress
from foreshot.data.folder import decoded, tensor
from foreshot.data.gtsrb import Zip
from foreshot.data.idx import read_idx, write_idx
from foreshot.data.tensor import TensorFile
from foreshot.models import ResNet, Vit, build
from foreshot.models.checkpoint import load_model, save_model, state_digest
from foreshot.poison import Poison

Mutation = Callable[[bytes, random.Random], bytes]
VALUES = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
NUMBERS = (0, 1, 2, 3, 7, 8, 255, 2**15, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64)
"""Numbers that sizes and offsets are replaced by."""
TEXTS = ("", "../../etc/passwd", "/etc/passwd", "a\0b", "\u202ea", "é" * 300, "{{7*7}}", "NaN")


def never(found: object, content: bytes) -> str:
    return ""


@dataclass(frozen=True)
class Loader:
    """A way for files to come in.

    Args:
        contents: whole files.
        read: what is fuzzed: it is given the path of a file.
        wrong: what is wrong with what was read, if anything is.
        structured: mutations that know the format.
        suffix: of the file's name.
        share: of all the files that are fuzzed, in percent.
    """

    contents: tuple[bytes, ...]
    read: Callable[[Path], Any]
    wrong: Callable[[Any, bytes], str]
    structured: tuple[Mutation, ...] = ()
    suffix: str = ""
    share: int = 8


def numbers(count: int, chance: random.Random) -> list[int]:
    return [chance.choice(NUMBERS) for _ in range(count)]


# idx ---------------------------------------------------------------------------------------------


def idx_header(content: bytes, chance: random.Random) -> bytes:
    """Another type, rank or shape."""
    rank = chance.choice((0, 1, 2, 3, 4, 255))
    sizes = [number % 2**32 for number in numbers(rank, chance)]
    head = bytes((0, 0, chance.choice((8, 8, 8, 9, 13)), rank)) + struct.pack(f">{rank}I", *sizes)
    return head + chance.randbytes(chance.choice((0, 16, 48)))


def inside(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> Mutation:
    """Damage to what is compressed, which is then compressed again."""

    def repacked(content: bytes, chance: random.Random) -> bytes:
        from fuzz import damaged

        inner = unpack(content)
        return pack(idx_header(inner, chance) if chance.random() < 0.5 else damaged(inner, chance))

    return repacked


@cache
def zeros(pack: Callable[[bytes], bytes], count: int) -> bytes:
    """So many bytes of nothing, compressed."""
    return pack(bytes(count))


def gzip_bomb(content: bytes, chance: random.Random) -> bytes:
    return zeros(gzip.compress, chance.choice((100, 1 << 16, 1 << 26)))


def lzma_bomb(content: bytes, chance: random.Random) -> bytes:
    return zeros(lzma.compress, chance.choice((100, 1 << 16, 1 << 24)))


def idx_wrong(found: torch.Tensor, content: bytes) -> str:
    return "" if found.dtype == torch.uint8 else f"{found.dtype}"


# CIFAR -------------------------------------------------------------------------------------------

CLASSES = tuple("abcdefghij")


def records_wrong(found: ImageSet, content: bytes) -> str:
    return "" if len(found) * 3073 == len(content) else "another number of images"


def tar(members: Mapping[str, bytes], change: Callable[[tarfile.TarInfo], object] = id) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            change(member)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), 1, mtime=0)


def cifar_members() -> dict[str, bytes]:
    kind = Cifar10.archive
    names = "\n".join(f"class{i}" for i in range(10)).encode()
    files = dict.fromkeys((*kind.train, *kind.test), bytes([3]) + bytes(3072))
    return {f"{kind.folder}/{name}": data for name, data in {kind.names: names, **files}.items()}


def cifar_archive(path: Path) -> Splits:
    """The archive as if its digest were the right one."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(Cifar10.archive, digest=digest, file=path.name).load(path.parent)


def tar_members(content: bytes, chance: random.Random) -> bytes:
    """Members that lead out, links, devices, and sizes that are not true."""
    from fuzz import damaged

    members = cifar_members()
    name = chance.choice(list(members))
    if chance.random() < 0.5:
        members[name] = damaged(members[name], chance)
    elif chance.random() < 0.5:
        members[chance.choice(TEXTS) or "x"] = members.pop(name)

    def change(member: tarfile.TarInfo) -> None:
        if member.name == name and chance.random() < 0.6:
            member.type = chance.choice(
                (b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"x", b"g", b"L")
            )
            member.linkname = chance.choice((*TEXTS, *members))

    return tar(members, change)


def tar_inside(content: bytes, chance: random.Random) -> bytes:
    from fuzz import damaged

    return gzip.compress(damaged(gzip.decompress(content), chance), 1, mtime=0)


def tar_bomb(content: bytes, chance: random.Random) -> bytes:
    """A member that grows a thousandfold."""
    return grown(chance.choice(list(cifar_members())))


@cache
def grown(name: str) -> bytes:
    return tar({**cifar_members(), name: bytes(1 << 26)})


def cifar_wrong(found: Splits, content: bytes) -> str:
    return "" if found.train.shape == found.test.shape == (3, 32, 32) else "another shape"


# GTSRB -------------------------------------------------------------------------------------------

HEAD = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n"
PPM = b"P6\n12 10\n255\n" + bytes(range(120)) * 3
SIGNS = {"a.csv": f"{HEAD}0.ppm;12;10;1;1;9;9;4\r\n".encode(), "0.ppm": PPM}


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return stream.getvalue()


def signs(path: Path) -> ImageSet:
    archive = Zip(path)
    return archive.images(list(archive.signs("a.csv", "")), 16)


def annotation(content: bytes, chance: random.Random) -> bytes:
    """Other values in a row, or other columns."""
    row = HEAD.strip().split(";")
    values = [chance.choice((*TEXTS, "0.ppm", *map(str, NUMBERS), "-1", "1e9")) for _ in row]
    values[0] = chance.choice(("0.ppm", "0.ppm", values[0]))
    if chance.random() < 0.3:
        row[chance.randrange(len(row))] = chance.choice(TEXTS)
    text = ";".join(row) + "\r\n" + ";".join(values) + "\r\n"
    return zipped({**SIGNS, "a.csv": text.encode(errors="surrogatepass")})


def zip_members(content: bytes, chance: random.Random) -> bytes:
    """A damaged picture, a bomb, a name that leads out, a name twice, or another method."""
    from fuzz import damaged

    members = dict(SIGNS)
    match chance.randrange(5):
        case 0:
            members["0.ppm"] = damaged(PPM, chance)
        case 1:
            return zip_bomb()
        case 2:
            members[chance.choice(TEXTS) or "x"] = members.pop("0.ppm")
        case 3:
            sizes = [number % 10**6 for number in numbers(2, chance)]
            members["0.ppm"] = b"P6\n%d %d\n255\n" % (sizes[0], sizes[1]) + bytes(400)
        case _:
            return zipped(members, chance.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    return zipped(members)


@cache
def zip_bomb() -> bytes:
    return zipped({**SIGNS, "0.ppm": PPM + bytes(1 << 26)})


def signs_wrong(found: ImageSet, content: bytes) -> str:
    return "" if found.shape == (3, 16, 16) else f"{found.shape}"


# Pictures ----------------------------------------------------------------------------------------


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    levels = np.arange(12 * 12 * 4, dtype=np.uint16).reshape(12, 12, 4)
    if mode == "I;16":
        picture = Image.fromarray(levels[..., 0] * 100)
    else:
        picture = Image.fromarray(levels[..., :3].astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(stream, kind, exif=exif, **options)
    return stream.getvalue()


def picture(path: Path) -> torch.Tensor:
    return tensor(decoded(path.read_bytes(), 3, 16, str(path)))


def picture_wrong(found: torch.Tensor, content: bytes) -> str:
    right = found.dtype == torch.uint8 and found.shape == (3, 16, 16)
    return "" if right else f"{found.dtype} {found.shape}"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_chunks(content: bytes, chance: random.Random) -> bytes:
    """Chunks changed, doubled, left out or put in, with checksums that are right."""
    from fuzz import damaged

    chunks, place = [], 8
    while place + 8 <= len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += 12 + size
    at = chance.randrange(len(chunks))
    kind, data = chunks[at]
    match chance.randrange(5):
        case 0:
            chunks[at] = kind, damaged(data, chance)
        case 1:
            chunks.insert(at, chunks[at])
        case 2:
            del chunks[at]
        case 3:
            name = chance.choice((b"zTXt", b"iTXt", b"iCCP", b"tRNS", b"PLTE", b"acTL", b"eXIf"))
            packed = zeros(zlib.compress, chance.choice((10, 1 << 20, 1 << 26)))
            chunks.insert(1, (name, chance.choice((b"a\0\0" + packed, chance.randbytes(20)))))
        case _:
            side = chance.choice((1, 12, 1000, 8191, 8192, 8193, 2**16, 2**31 - 1))
            depth = chance.choice((b"\x08\x02", b"\x08\x06", b"\x10\x00", b"\x01\x00", b"\x10\x06"))
            head = struct.pack(">II", side, chance.choice((1, side))) + depth + bytes(3)
            chunks[0] = b"IHDR", head
    return content[:8] + b"".join(chunk(*one) for one in chunks)


def png_bomb(content: bytes, chance: random.Random) -> bytes:
    """A picture of the largest size that is allowed, or larger, in few bytes; one in a hundred."""
    if chance.random() > 0.01:
        return png_chunks(content, chance)
    kinds = (8, 2, 3), (8, 6, 4), (16, 0, 2), (1, 0, 0.125)
    return blank(chance.choice((8191, 8192, 8193, 20_000)), *chance.choice(kinds))


@cache
def blank(side: int, depth: int, colour: int, size: float) -> bytes:
    """A black PNG.

    Args:
        side: in pixels; no more than 8193 of its rows are there.
        depth: bits a channel.
        colour: PNG's type of colour.
        size: bytes a pixel.
    """
    head = struct.pack(">IIBB", side, side, depth, colour) + bytes(3)
    row = bytes(1 + int(-(-side * size // 1)))
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(row) for _ in range(min(side, 8193))) + packer.flush()
    return PNGS[0][:8] + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg_segments(content: bytes, chance: random.Random) -> bytes:
    """Another size in the frame, or a damaged segment of another length."""
    frame = re.search(rb"\xff[\xc0\xc2]..\x08(....)", content, re.S)
    assert frame
    if chance.random() < 0.3:
        sides = [number % 2**16 for number in numbers(2, chance)]
        return content[: frame.start(1)] + struct.pack(">HH", *sides) + content[frame.end(1) :]
    segment = chance.choice(list(re.finditer(rb"\xff[\xc0-\xfe](..)", content, re.S)))
    size = struct.pack(">H", chance.choice(NUMBERS) % 2**16)
    return content[: segment.start(1)] + size + content[segment.end(1) :]


def webp_chunks(content: bytes, chance: random.Random) -> bytes:
    """Other sizes in the headers of the container."""
    at = chance.choice([found.start() for found in re.finditer(rb"VP8|EXIF|ICCP|RIFF", content)])
    size = struct.pack("<I", chance.choice(NUMBERS) % 2**32)
    place = at + chance.choice((4, 8, 12))
    return content[:place] + size[: chance.choice((3, 4))] + content[place + 4 :]


# safetensors -------------------------------------------------------------------------------------


def safetensors_header(content: bytes, chance: random.Random) -> bytes:
    """Another value somewhere in the header, or in the JSON that its metadata holds."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    held = header.get("__metadata__", {})
    inner = {key: json.loads(text) for key, text in held.items() if text[:1] in '{["'}
    if inner and chance.random() < 0.6:
        shaken(inner, chance)
        for key, value in inner.items():
            held[key] = json.dumps(value)
        held.pop("foreshot-sha256", None)  # or nothing else would ever be looked at
    else:
        shaken(header, chance)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def shaken(tree: Any, chance: random.Random) -> None:
    """Changes one value of a JSON tree, or more."""
    node = tree
    for _ in range(8):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = chance.choice(keys)
        below = node[key]
        if isinstance(below, dict | list) and below and chance.random() < 0.85:
            node = below
            continue
        match chance.randrange(6):
            case 0:
                del node[key]
            case 1:
                node[key] = chance.choice(TEXTS)
            case 2:
                node[key] = chance.choice((None, True, -1, 0.5, 1e308, [], {}, [[]], [1, "a"]))
            case _:
                node[key] = chance.choice(NUMBERS)
        return


def tensor_set(path: Path) -> Splits:
    return TensorFile(path=path, test_path=path).load(path.parent)


def tensor_wrong(found: Splits, content: bytes) -> str:
    train = found.train
    return "" if train.images.dtype == torch.uint8 and train.images.ndim == 4 else "no images"


def made(write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def model(architecture: Any, side: int) -> bytes:
    images = torch.zeros(2, 1, side, side, dtype=torch.uint8)
    network = build(architecture, images, 3, seed=0, key="x")
    classes = ("cat", "<dog>", "ünï")
    return made(lambda path: save_model(path, network, architecture, (1, side, side), classes))


MODELS = (ResNet(depth=8, width=0.125), 8), (Vit(dim=8, depth=3, heads=1), 8)


@cache
def digests() -> set[str]:
    return {state_digest(build(a, torch.zeros(2, 1, s, s, dtype=torch.uint8), 3, 0, "x"))
            for a, s in MODELS}  # fmt: skip


def model_wrong(found: Any, content: bytes) -> str:
    return "" if state_digest(found.model) in digests() else "other weights"


POISON = Poison(torch.tensor([1, 5, 6]), VALUES.reshape(3, 1, 4, 4), torch.tensor([0, 1, 2]))


def poison_wrong(found: tuple[Poison, dict[str, Any]], content: bytes) -> str:
    if b"foreshot-sha256" in content and found[0].digest != POISON.digest:
        return "other poison"
    return ""


# YAML --------------------------------------------------------------------------------------------

TAGS = ("!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!binary x", "!!set x")


def yaml_values(content: bytes, chance: random.Random) -> bytes:
    """Another value in a line."""
    lines = content.decode().splitlines()
    at = chance.randrange(len(lines))
    value = chance.choice(
        (*TEXTS, *TAGS, *map(str, NUMBERS), "[", "{", "*a", "&a b", "- -", ".inf")
    )
    lines[at] = lines[at].partition(":")[0] + f": {value}"
    return "\n".join(lines).encode()


def config(path: Path) -> Any:
    return load_config(path)


def config_wrong(found: Any, content: bytes) -> str:
    return "" if parse(dump(found), "again") == found else "it does not round-trip"


IDX, GZ = write_idx(VALUES), gzip.compress(write_idx(VALUES), mtime=0)
XZ = lzma.compress(write_idx(VALUES))
PNGS = tuple(encoded("PNG", mode) for mode in ("RGB", "RGBA", "P", "L", "1", "I;16"))
LOADERS = {
    "idx": Loader(
        (IDX,), lambda p: read_idx(p.read_bytes(), str(p)), idx_wrong, (idx_header,), share=17
    ),
    "idx.gz": Loader(
        (GZ,),
        lambda p: read_idx(decompress(p, 64), str(p)),
        idx_wrong,
        (inside(lambda b: gzip.compress(b, 1, mtime=0), gzip.decompress), gzip_bomb),
        ".gz",
    ),
    "idx.xz": Loader(
        (XZ,),
        lambda p: read_idx(decompress(p, 64), str(p)),
        idx_wrong,
        (inside(lambda b: lzma.compress(b, preset=0), lzma.decompress), lzma_bomb),
        ".xz",
    ),
    "cifar records": Loader(
        (bytes(range(2)) * 3073,),
        lambda p: read_records(p.read_bytes(), 1, CLASSES, str(p)),
        records_wrong,
    ),
    "cifar archive": Loader(
        (tar(cifar_members()),),
        cifar_archive,
        cifar_wrong,
        (tar_members, tar_inside, tar_bomb),
        ".tar.gz",
        share=4,
    ),
    "gtsrb": Loader(
        (zipped(SIGNS), zipped(SIGNS, zipfile.ZIP_STORED)),
        signs,
        signs_wrong,
        (annotation, zip_members),
        ".zip",
    ),
    "png": Loader(PNGS, picture, picture_wrong, (png_chunks, png_bomb), ".png"),
    "jpeg": Loader(
        (
            encoded("JPEG"),
            encoded("JPEG", "L"),
            encoded("JPEG", "CMYK"),
            encoded("JPEG", progressive=True),
            encoded("MPO", save_all=True, append_images=[Image.new("RGB", (12, 12))]),
        ),
        picture,
        picture_wrong,
        (jpeg_segments,),
        ".jpg",
    ),
    "webp": Loader(
        (encoded("WEBP"), encoded("WEBP", "RGBA", lossless=True)),
        picture,
        picture_wrong,
        (webp_chunks,),
        ".webp",
    ),
    "tensors": Loader(
        (
            save(
                {"images": VALUES.reshape(3, 1, 4, 4), "labels": torch.tensor([0, 1, 2])},
                {"classes": '["a", "b", "c"]'},
            ),
        ),
        tensor_set,
        tensor_wrong,
        (safetensors_header,),
    ),
    "model": Loader(
        tuple(model(*each) for each in MODELS),
        load_model,
        model_wrong,
        (safetensors_header,),
        share=4,
    ),
    "poison": Loader(
        (made(lambda path: POISON.save(path, {"target": 1, "trigger": {"name": "dot"}})),),
        Poison.load,
        poison_wrong,
        (safetensors_header,),
    ),
    "config": Loader(
        (dump(load_config("signs")).encode(), *(p.read_bytes() for p in presets().values())),
        config,
        config_wrong,
        (yaml_values,),
        ".yaml",
        share=3,
    ),
}
