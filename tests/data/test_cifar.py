import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foreshot.data.cifar import Archive, Cifar10, Cifar100, read_records
from foreshot.errors import ForeshotError

NAMES = {
    Cifar10: b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n",
    Cifar100: "".join(f"thing_{i}\n" for i in range(100)).encode(),
}


def record(labels: list[int], start: int) -> bytes:
    return bytes(labels) + bytes((start + i) % 256 for i in range(3072))


@pytest.fixture(params=[Cifar10, Cifar100], ids=["cifar10", "cifar100"])
def tiny(request, tmp_path, monkeypatch):
    """A dataset whose archive in the cache has one record in each file, and what they hold."""
    kind = request.param
    real: Archive = kind.archive
    coarse = [7] * (real.label_bytes - 1)
    contents = {
        file: record([*coarse, index + 3], start=index)
        for index, file in enumerate([*real.train, *real.test])
    }
    digests = {file: hashlib.sha256(data).hexdigest() for file, data in contents.items()}
    contents[real.names] = NAMES[kind]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for file, data in contents.items():
            member = tarfile.TarInfo(f"{real.folder}/{file}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    path = tmp_path / kind().name / real.file
    path.parent.mkdir()
    path.write_bytes(stream.getvalue())
    archive = replace(
        real,
        digest=hashlib.sha256(stream.getvalue()).hexdigest(),
        train={file: digests[file] for file in real.train},
        test={file: digests[file] for file in real.test},
    )
    monkeypatch.setattr(kind, "archive", archive)
    return kind(), path, contents


def unpack(path: Path, folder: str, contents: dict[str, bytes]) -> Path:
    path.unlink()
    unpacked = path.parent / folder
    unpacked.mkdir()
    for file, data in contents.items():
        (unpacked / file).write_bytes(data)
    return unpacked


def test_reads_the_archive_in_place(tiny, tmp_path) -> None:
    dataset, path, _ = tiny
    train, test = dataset.load(tmp_path)
    files = len(dataset.archive.train)
    assert train.labels.tolist() == list(range(3, 3 + files))
    assert test.labels.tolist() == [3 + files]
    assert train.images[0, 0, 0, :3].tolist() == [0, 1, 2]
    assert train.images[0, 1, 2, 5] == (1024 + 2 * 32 + 5) % 256
    assert train.images[0, 2, 31, 31] == 3071 % 256
    assert test.images[0, 0, 0, 0] == files
    assert train.classes[3] == NAMES[type(dataset)].decode().split()[3]
    assert list(path.parent.iterdir()) == [path]


def test_the_unpacked_folder_gives_the_same(tiny, tmp_path) -> None:
    dataset, path, contents = tiny
    packed = dataset.load(tmp_path)
    unpack(path, dataset.archive.folder, contents)
    unpacked = dataset.load(tmp_path)
    assert [half.digest for half in packed] == [half.digest for half in unpacked]


def test_another_archive_is_refused(tiny, tmp_path) -> None:
    dataset, path, _ = tiny
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ForeshotError, match=f"{path}: expected sha256"):
        dataset.load(tmp_path)


def test_another_file_in_the_folder_is_refused(tiny, tmp_path) -> None:
    dataset, path, contents = tiny
    file = next(iter(dataset.archive.test))
    changed = contents[file][:-1] + bytes([contents[file][-1] ^ 1])
    folder = unpack(path, dataset.archive.folder, contents | {file: changed})
    with pytest.raises(ForeshotError, match=f"{folder / file}: expected sha256"):
        dataset.load(tmp_path)
    (folder / file).unlink()
    with pytest.raises(ForeshotError, match=f"{folder / file}: expected a readable file"):
        dataset.load(tmp_path)


def test_an_archive_without_a_file_is_refused(tiny, tmp_path, monkeypatch) -> None:
    dataset, _, _ = tiny
    monkeypatch.setattr(type(dataset), "archive", replace(dataset.archive, names="no.txt"))
    with pytest.raises(ForeshotError, match=r"no\.txt"):
        dataset.load(tmp_path)


def test_class_names_are_counted(tiny, tmp_path) -> None:
    dataset, path, contents = tiny
    names = dataset.archive.names
    unpack(path, dataset.archive.folder, contents | {names: b"one\n"})
    with pytest.raises(ForeshotError, match=f"{names}: expected 100? class names, found 1"):
        dataset.load(tmp_path)


def test_the_fine_label_is_the_second_byte() -> None:
    records = read_records(record([19, 99], 0) + record([0, 1], 5), 2, ("x",) * 100, "train.bin")
    assert records.labels is not None
    assert records.labels.tolist() == [99, 1]
    assert records.images[1].flatten()[0] == 5
    assert records.images.dtype == torch.uint8


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "records of 3073 bytes, found 0"),
        (record([1], 0)[:-1], "records of 3073 bytes, found 3072"),
        (record([10], 0), "labels up to 9, found 10"),
    ],
)
def test_what_are_not_records_is_refused(data, complaint) -> None:
    with pytest.raises(ForeshotError, match=f"batch: expected {complaint}"):
        read_records(data, 1, ("x",) * 10, "batch")
