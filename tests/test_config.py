"""A config is read, changed by hand, written and read again; a bad one gets a sentence."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from foreshot.attacks import ATTACKS, Counterfactual, Cw, Fgsm, Pgd
from foreshot.config import (
    Config,
    Defender,
    Distillation,
    Network,
    Surrogate,
    dump,
    load_config,
    parse,
    presets,
)
from foreshot.data import Digits
from foreshot.defences import Combined
from foreshot.defences.screens import Frequency, LocalDimension
from foreshot.distillation import KD, Term
from foreshot.errors import ForeshotError
from foreshot.models import ARCHITECTURES, ResNet, Vgg
from foreshot.training import Training
from foreshot.triggers import TRIGGERS, Dot, Grid


def sentence(text: str, *arguments: str) -> str:
    with pytest.raises(ForeshotError) as caught:
        parse(text, "mine.yaml", arguments)
    found = str(caught.value)
    assert "\n" not in found
    assert len(found) < 2000
    return found


@pytest.mark.parametrize("name", presets())
def test_a_preset_loads_round_trips_and_says_what_it_is(name: str) -> None:
    config = load_config(name)
    assert parse(dump(config), name) == config
    assert yaml.safe_load(dump(config)).keys() == Config.model_fields.keys()
    first = presets()[name].read_text(encoding="utf-8").split("\n", 1)[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_the_presets_are_there_and_the_default_config_round_trips() -> None:
    assert {"signs", "digits"} <= presets().keys()
    assert parse(dump(Config()), "default") == Config() == parse("", "empty")


def test_any_config_round_trips(tmp_path: Path) -> None:
    config = Config(
        seed=2**63 - 1,
        precision="float32",
        data=Digits(),
        teacher=Network(model=Vgg(), training=Training(lr=1e-7, augment="strong")),
        trigger=Grid(colour=(1, 2, 3)),
        attack=Cw(count=3, kappa=0.1, step=0.25),
        surrogate=Surrogate(data="disjoint"),
        defence=Combined(screens=(Frequency(level=3), LocalDimension())),
        defender=Defender(clean=0, remove=0.125),
        distillation=Distillation(
            terms=(Term(loss=KD(temperature=2.5), weight=0), Term(loss=KD(), at=(("a.b", "c"),))),
            ce_weight=0.5,
            views="cached",
        ),
        controls=(),
    )
    file = tmp_path / "c.yaml"
    file.write_text(dump(config))
    assert load_config(file) == load_config(str(file)) == config


@pytest.mark.parametrize("name", ATTACKS)
def test_the_name_of_an_attack_can_be_set_over_the_parameters_of_another(name: str) -> None:
    config = parse("attack: {name: pgd, epsilon: 7, steps: 3}", "x", [f"attack.name={name}"])
    assert config.attack.model_dump()["name"] == name
    assert config.attack.epsilon == 7
    own = {"cw_l2", "tang", "sleeper_agent"}  # with steps of another kind, or more of them
    steps = {"steps": 3} if isinstance(config.attack, Pgd) and name not in own else {}
    assert config.attack == ATTACKS[name].model_validate({"epsilon": 7, **steps})


def test_a_parameter_that_means_something_else_is_not_taken_over(tmp_path: Path) -> None:
    """What `weight` weighs differs between attacks, and a default of a class's own is its own."""
    assert load_config("signs").attack.model_dump()["weight"] == 0.002
    dehib = load_config("signs", ["attack.name=dehib"])
    assert dehib.attack.model_dump()["weight"] == ATTACKS["dehib"].model_fields["weight"].default
    assert dehib.attack.model_dump()["steps"] == 20  # of all that descend
    # The same with all defaults written out, as `foreshot show signs` prints them.
    written = tmp_path / "mine.yaml"
    written.write_text(dump(load_config("signs")))
    for name in ("dehib", "sleeper_agent", "label_consistent", "tang"):
        kept = {"rate", "epsilon", "steps", "temperature", "rounds", "student", "training"}
        one, other = (load_config(of, [f"attack.name={name}"]).attack for of in ("signs", written))
        assert one.model_dump(exclude=kept) == other.model_dump(exclude=kept)
        assert one.model_dump(exclude=kept) == ATTACKS[name].model_validate({}).model_dump(
            exclude=kept
        )
    patch = load_config("signs", ["trigger.name=patch"]).trigger
    assert patch == TRIGGERS["patch"].model_validate({})


@pytest.mark.parametrize(
    "settings",
    [
        ["attack.weight=3", "attack.name=dehib", "attack.steps=7"],
        ["attack.steps=7", "seed=1", "attack.weight=3", "attack.name=dehib"],
        ["attack.name=dehib", "attack.weight=3", "attack.steps=7"],
        ["attack.name=tang", "attack.steps=7", "attack.name=dehib", "attack.weight=3"],
        ["attack={name: tang}", "attack.weight=3", "attack.steps=7", "attack.name=dehib"],
        ["attack.steps=5", "attack={name: dehib, weight: 3, steps: 7}"],
    ],
)
def test_a_member_has_the_parameters_that_are_set_in_whatever_order(settings: list[str]) -> None:
    attack = load_config("signs", settings).attack.model_dump()
    assert (attack["name"], attack["weight"], attack["steps"]) == ("dehib", 3, 7)


def test_names_of_every_family_can_be_set() -> None:
    for name in TRIGGERS:
        assert load_config("signs", [f"trigger.name={name}"]).trigger.model_dump()["name"] == name
    for name in ARCHITECTURES:
        tree = yaml.safe_dump({"student": {"model": {"name": "resnet"}}})
        config = parse(tree, "x", [f"student.model.name={name}"])
        assert config.student.model == ARCHITECTURES[name].model_validate({})
    with pytest.raises(ForeshotError, match=r"student\.model\.depth: found 8; expected one of 16"):
        load_config("signs", ["student.model.name=wide_resnet", "student.model.depth=8"])
    assert isinstance(load_config("signs", ["data.name=digits"]).data, Digits)


def test_keys_are_set_where_they_are_and_where_they_are_not() -> None:
    config = parse(
        "{}",
        "x",
        [
            "attack.rate=0.25",
            "teacher.training.epochs=3",
            "distillation.terms.0.loss.temperature=9",
            "distillation.terms.0.weight=0.5",
            "surrogate.training.lr=0.5",
            "defence.name=combined",
            "defence.screens=[{name: lid, neighbours: 3}]",
            "defender.level=0.5",
            "trigger.colour=[1, 2, 3]",
            "controls=[noise]",
            "seed=7",
        ],
    )
    assert isinstance(config.attack, Pgd)
    assert config.attack.rate == 0.25
    assert config.teacher == Network(training=Training(epochs=3))
    assert config.student == Network()
    assert config.distillation.terms == (Term(loss=KD(temperature=9), weight=0.5),)
    assert config.surrogate == Surrogate(training=Training(lr=0.5))
    assert config.defence == Combined(screens=(LocalDimension(neighbours=3),))
    assert config.defender == Defender(level=0.5)
    assert config.trigger == Dot(colour=(1, 2, 3))
    assert config.controls == ("noise",)
    assert config.seed == 7


def test_the_last_setting_wins_and_settings_come_in_order() -> None:
    assert parse("seed: 1", "x", ["seed=2", "seed=3"]).seed == 3
    config = parse("", "x", ["attack.name=fgsm", "attack.epsilon=2"])
    assert config.attack == Fgsm(epsilon=2)
    assert parse("", "x", ["attack.name=pgd", "attack.steps=9"]).attack == Pgd(steps=9)
    assert parse("surrogate: {}", "x", ["surrogate=null"]).surrogate is None


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().seed = 3  # type: ignore[misc]
    assert Config().teacher.model == ResNet(depth=8)
    assert hash(Config()) == hash(Config())


def test_a_key_of_a_member_without_a_proper_name_is_one_sentence() -> None:
    with pytest.raises(ForeshotError, match=r"attack.name: found \[1\]; expected one of clean"):
        parse("", "x", ["attack={name: [1]}", "attack.training.epochs=3"])


@pytest.mark.parametrize(
    ("text", "settings", "long"),
    [
        ("attack: fgsm", [], ["attack.name=fgsm"]),
        ("", ["attack=fgsm"], ["attack.name=fgsm"]),
        ("attack: {name: cw, rate: 0.2}", ["attack=fgsm"], ["attack={name: fgsm, rate: 0.2}"]),
        ("", ["attack.rate=0.2", "attack=fgsm"], ["attack={name: fgsm, rate: 0.2}"]),
        ("attack: fgsm", ["attack.rate=0.2"], ["attack={name: fgsm, rate: 0.2}"]),
        ("", ["attack.rate=0.2", "attack= 'fgsm'  # !"], ["attack={name: fgsm, rate: 0.2}"]),
        ("", ["distillation.terms.0.loss=dkd"], ["distillation.terms=[{loss: {name: dkd}}]"]),
        (
            "defence: {name: combined, screens: [scan, {name: lid, neighbours: 3}]}",
            [],
            ["defence={name: combined, screens: [{name: scan}, {name: lid, neighbours: 3}]}"],
        ),
        (
            "",
            ["defence.screens=[scan, lid]", "defence=combined"],
            ["defence={name: combined, screens: [{name: scan}, {name: lid}]}"],
        ),
        (
            "",
            ["surrogate={model: {name: ensemble, of: resnet, count: 2}}"],
            ["surrogate={model: {name: ensemble, of: {name: resnet}, count: 2}}"],
        ),
    ],
)
def test_a_bare_name_is_a_member_of_its_family(
    text: str, settings: list[str], long: list[str]
) -> None:
    assert parse(text, "x", settings) == parse("", "x", long)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tacher: {}", "tacher: no such key; did you mean 'teacher'?"),
        ("attack: {name: pgd, epsilom: 3}", "attack.epsilom: no such key; did you mean 'epsilon'?"),
        ("attack: {name: pgdd}", "attack.name: found 'pgdd'; did you mean 'pgd'?"),
        ("attack: {epsilon: 3}", "attack: expected {name: ...}, one of clean, trigger_only, "),
        ("data: digts", "data.name: found 'digts'; did you mean 'digits'?"),
        ("data: [1]", "data: expected {name: ...}, one of signs, "),
        ("data: {name: 3}", "data.name: found 3; expected one of signs, "),
        ("data: {name: null}", "data.name: found None; expected one of signs, "),
        ("data: {name: [a]}", "data.name: found ['a']; expected one of signs, "),
        ("precision: float16", "precision: found 'float16'; did you mean 'bfloat16'?"),
        ("precision: 16", "precision: found 16; expected one of auto, float32, bfloat16"),
        ("seed: -1", "seed: input should be greater than or equal to 0, found -1"),
        ("seed: a", "seed: input should be a valid integer, unable to parse string as an integer"),
        ("seed: [1]", "seed: input should be a valid integer, found [1]"),
        ("attack: {name: pgd, rate: 0}", "attack.rate: input should be greater than 0, found 0"),
        ("attack: {name: pgd, trigger: insid}", "attack.trigger: found 'insid'; did you mean 'ins"),
        ("teacher: {model: {name: resnet, depth: 9}}", "teacher.model.depth: found 9; expected "),
        ("teacher: {model: {name: resnt}}", "teacher.model.name: found 'resnt'; did you mean "),
        ("teacher: {modl: 3}", "teacher.modl: no such key; did you mean 'model'?"),
        ("teacher: {training: {epoch: 3}}", "teacher.training.epoch: no such key; did you mean "),
        ("defence: {name: scna}", "defence.name: found 'scna'; did you mean 'scan'?"),
        ("defence: {name: lid, k: 3}", "defence.k: no such key; expected one of name, neighbours"),
        ("defender: {remove: 0}", "defender.remove: input should be greater than 0, found 0"),
        ("surrogate: {modle: 3}", "surrogate.modle: no such key; did you mean 'model'?"),
        ("surrogate: {model: {name: vg}}", "surrogate.model.name: found 'vg'; did you mean 'vgg'?"),
        ("trigger: {name: dot, colour: [1, 2]}", "trigger.colour.2: field required"),
        ("trigger: {name: dot, colour: [1, 2, 256]}", "trigger.colour.2: input should be less"),
        ("controls: [clan]", "controls.0: found 'clan'; did you mean 'clean'?"),
        ("controls: clean", "controls: input should be a valid tuple, found 'clean'"),
        ("distillation: {terms: []}", "distillation.terms: tuple should have at least 1 item"),
        ("distillation: {ce_weight: .nan}", "distillation.ce_weight: input should be "),
        (
            "distillation: {terms: [{loss: {name: kdd}}]}",
            "distillation.terms.0.loss.name: found 'kdd'; did you mean 'kd'?",
        ),
        (
            "distillation: {terms: [{loss: {name: kd, temprature: 1}}]}",
            "distillation.terms.0.loss.temprature: no such key; did you mean 'temperature'?",
        ),
        (
            "distillation: {terms: [{loss: {name: kd}, wieght: 1}]}",
            "distillation.terms.0.wieght: no such key; did you mean 'weight'?",
        ),
        ("1: 2", "expected YAML: the key 1 is no text"),
        ("distillation: {terms: [{loss: {name: kd}, 0.9}]}", "expected YAML: the key 0.9 is no t"),
        ("- 1", "expected keys and values, found list"),
        ("hello", "expected keys and values, found str"),
        ("seed: [1", "expected YAML: while parsing a flow sequence "),
        ("seed: 2001-99-99", "expected YAML: month must be in 1..12"),
        ("seed: !!int x", "expected YAML: invalid literal for int()"),
        ("seed: !!bool x", "expected YAML: 'x'"),
        ("seed: !!timestamp x", "expected YAML: "),
        ("seed: " + "9" * 5000, "expected YAML: "),
        ("seed: 0x" + "f" * 5000, "seed: input should be less than 9223372036854775808, found a v"),
        ("seed: \x01", "expected YAML: unacceptable character #x0001"),
        ("seed: &a [*a]", "expected YAML: there are more than 10000 values, aliases counted"),
        (r'{"a\nb": 1}', r"'a\nb': no such key; expected one of seed, "),
        (r'{"\e[31m": 1}', r"'\x1b[31m': no such key; expected one of seed, "),
        ("seed: 1\nseed: 2", "expected YAML: the key 'seed' stands there twice"),
        ("student: {training: {lr: .inf}}", "student.training.lr: input should be a finite"),
        ("trigger: {name: blend, opacity: .nan}", "trigger.opacity: input should be a finite"),
        ("distillation: {ce_weight: .inf}", "distillation.ce_weight: input should be a finite"),
        ("a: 1\n---\nb: 2", "expected YAML: expected a single document"),
        ('seed: !!int ""', "expected YAML: "),
        ("controls: [clean, clean]", "controls: expected each once, found ['clean', 'clean']"),
    ],
)  # fmt: skip
def test_bad_input_is_answered_by_one_sentence(text: str, expected: str) -> None:
    assert sentence(text).startswith(f"mine.yaml: {expected}")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("seed", "--set seed: expected KEY=VALUE, such as attack.rate=0.01"),
        ("sed=1", "mine.yaml: sed: no such key; did you mean 'seed'?"),
        ("=1", "mine.yaml: : no such key; expected one of seed"),
        ("attack.rte=1", "mine.yaml: attack.rte: no such key; did you mean 'rate'?"),
        ("a.b.c=1", "mine.yaml: a: no such key"),
        ("seed.x=1", "mine.yaml: seed: input should be a valid integer, found {'x': 1}"),
        ("seed=[", "--set seed=[: expected YAML: "),
        ("seed=2001-99-99", "--set seed=2001-99-99: expected YAML: "),
        ("attack.name=[1]", "mine.yaml: attack.name: found [1]; expected one of clean"),
        ("attack.name=pdg", "mine.yaml: attack.name: found 'pdg'; did you mean 'pgd'?"),
        ("distillation.terms.0=1", "--set distillation.terms.0=1: distillation.terms has no keys"),
        (
            "distillation.terms.5.weight=1",
            "--set distillation.terms.5.weight=1: distillation.terms has 1 items, counted from 0; "
            "found 5",
        ),
        ("distillation.terms.².weight=1", "--set distillation.terms.².weight=1: distillation.ter"),
        ("distillation.terms.-1.weight=1", "--set distillation.terms.-1.weight=1: distillation.t"),
    ],
)
def test_a_bad_setting_is_answered_by_one_sentence(setting: str, expected: str) -> None:
    assert sentence("", setting).startswith(expected)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ForeshotError, match="^sings: expected a preset or a YAML file; did you me"):
        load_config("sings")
    with pytest.raises(ForeshotError, match="expected a preset or a YAML file; expected one of "):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xe9")
    with pytest.raises(ForeshotError, match=r"latin\.yaml: expected UTF-8 text: "):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system ['true']", "name:os.system", "module:os", "object:a.B {}"]
)
def test_no_tag_makes_python_objects(tag: str) -> None:
    found = sentence(f"seed: !!python/{tag}")
    assert "could not determine a constructor for the tag" in found
    assert "could not determine" in sentence("", f"seed=!!python/{tag}")


def bomb(line: str, last: str) -> str:
    """Nine times nine times ... nine: ten levels of aliases."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} " + line % ", ".join([f"*a{i - 1}"] * 9) for i in range(1, 11)]
    return "\n".join([*lines, last])


@pytest.mark.parametrize(
    "text",
    [
        bomb("[%s]", "seed: *a10"),
        bomb("[%s]", "precision: *a10"),
        bomb("[%s]", "attack: {name: *a10}"),
        bomb("[%s]", "distillation: {terms: *a10}"),
        bomb("{<<: [%s]}", "seed: 1"),
        bomb("{<<: [%s]}", "seed: *a10"),
        "seed: " + "[" * 1000,
        "{a: " * 3000,
        "\n".join(" " * depth + "a:" for depth in range(1500)),
    ],
    ids=["list", "literal", "name", "terms", "merge", "merged", "flow", "braces", "block"],
)
def test_no_bomb_goes_off(text: str) -> None:
    began = time.process_time()
    sentence(text)
    assert time.process_time() - began < 5


WORDS = st.sampled_from(
    ["seed", "attack", "name", "pgd", "data", "digits", "teacher", "model", "training", "terms",
     "distillation", "loss", "kd", "surrogate", "controls", "trigger", "dot", "colour", "null"]
)  # fmt: skip
leaves = (
    WORDS
    | st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.dates()
    | st.text("ab:-?!&*[]{}'\"\n\\é", max_size=5)
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


def answered(text: str, setting: str | None = None) -> None:
    """Either a config that round-trips, or one sentence."""
    try:
        config = parse(text, "junk", () if setting is None else [setting])
    except ForeshotError as error:
        assert str(error)
        assert setting is not None or "\n" not in str(error)
    else:
        assert parse(dump(config), "again") == config


@given(st.text("abs:-?!&*[]{}'\"%@|>,#\n\t \\\x00\ud800é0.", max_size=60))
@settings(deadline=None, max_examples=150)
def test_junk_is_answered(text: str) -> None:
    answered(text)


@given(trees, st.dictionaries(st.sampled_from(list(Config.model_fields)), trees, max_size=3))
@settings(deadline=None, max_examples=150)
def test_trees_are_answered(tree: Any, known: dict[str, Any]) -> None:
    answered(yaml.safe_dump(tree, allow_unicode=True))
    answered(yaml.safe_dump(known, allow_unicode=True))


@given(
    st.lists(WORDS | st.sampled_from(["0", "1", "", "²", "weight", "at"]), min_size=1, max_size=5),
    trees,
)
@settings(deadline=None, max_examples=150)
def test_settings_are_answered(keys: list[str], value: Any) -> None:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    answered("attack: {name: pgd}", f"{'.'.join(keys)}={text}")


def test_a_key_of_a_part_that_only_the_chosen_member_has_can_be_set() -> None:
    settings = ["attack.name=counterfactual", "attack.student.width=0.5"]
    config = parse("attack: {name: pgd, steps: 3}", "mine.yaml", settings)
    assert isinstance(config.attack, Counterfactual)
    assert config.attack.student == ResNet(depth=8, width=0.5)
    with pytest.raises(ForeshotError, match="student"):
        parse("", "mine.yaml", ["attack.name=pgd", "attack.student.width=0.5"])
