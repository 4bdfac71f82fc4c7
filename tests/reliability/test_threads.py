"""Another number of threads makes other bits, which is said, and the same rates within chance."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foreshot.compute import with_threads
from foreshot.config import load_config
from foreshot.errors import ForeshotError
from foreshot.experiment import run
from foreshot.files import file_digest, read_json


def rates(tree: dict[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """All rates of `metrics.json` but those of single classes, by their place."""
    for key, value in tree.items():
        if isinstance(value, dict) and key != "per_class":
            if "hits" in value:
                yield f"{where}{key}", value
            yield from rates(value, f"{where}{key}.")


@pytest.mark.slow
def test_rates_of_one_and_of_two_threads_agree_within_their_intervals(tmp_path: Path) -> None:
    config, told = load_config("digits", ["attack.epsilon=48"]), []
    for threads in (1, 2):
        with with_threads(threads):
            metrics = run(config, tmp_path / str(threads), store=tmp_path / "store", device="cpu")
        told.append(dict(rates(metrics)))
        assert read_json(tmp_path / str(threads) / "manifest.json")["threads"] == threads
    one, two = told
    print({name: (one[name]["value"], two[name]["value"]) for name in one})
    assert one.keys() == two.keys()
    for name, rate in one.items():
        assert rate["low"] <= two[name]["high"], name
        assert two[name]["low"] <= rate["high"], name
    digests = {file_digest(tmp_path / n / "teacher.safetensors") for n in ("1", "2")}
    assert len(digests) == 2, "no stage of the one is taken for the other's"


def test_more_threads_than_a_system_gives_are_refused() -> None:
    told = "threads: expected 1 to [0-9]+, found 99999999"
    with pytest.raises(ForeshotError, match=told), with_threads(99_999_999):
        pass
