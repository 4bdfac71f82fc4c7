"""Each loader is given damaged and made-up files: it refuses them, or reads them rightly."""

import os

import pytest
from formats import LOADERS
from fuzz import FORBIDDEN, SEED, fuzz, mutated, watch

COUNT = 100_000
"""Files in all, of the slow test."""


def test_the_shares_are_of_a_hundred() -> None:
    assert sum(loader.share for loader in LOADERS.values()) == 100


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_follows_from_its_number(name: str) -> None:
    made = [mutated(name, number)[1] for number in range(20)]
    assert made == [mutated(name, number)[1] for number in range(20)]
    assert len(set(made)) > 10


@pytest.mark.parametrize("name", LOADERS)
def test_some_files(name: str) -> None:
    check(name, 150)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
def test_many_files(name: str) -> None:
    check(name, COUNT * LOADERS[name].share // 100)


def check(name: str, count: int) -> None:
    outcome = fuzz(name, count)
    assert outcome.faults == {}, (SEED, name)
    assert outcome.files == count == outcome.read + outcome.refused
    assert outcome.refused > count / 10
    assert outcome.read > 0


def test_what_must_not_happen_is_noticed() -> None:
    """In a child, as an audit hook stays for the rest of a process."""
    child = os.fork()
    if not child:
        happened: list[str] = []
        watch(happened, "/nowhere")
        os.system("true")
        with open(os.devnull, "w"):  # noqa: PTH123
            pass
        found = len(happened) == 2 and "os.system" in FORBIDDEN
        os._exit(not found)
    assert os.waitpid(child, 0)[1] == 0
