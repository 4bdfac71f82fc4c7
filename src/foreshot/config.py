"""One experiment, one frozen config; and how it is read, and set by hand."""

from collections.abc import Iterable, Sequence
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from foreshot.attacks import AnyAttack, Pgd
from foreshot.compression import AnyCompression, Prune
from foreshot.compromises import AnyCompromise
from foreshot.compute import Precision
from foreshot.data import AnyDataset, Signs
from foreshot.defences import AnyDefence, Repair
from foreshot.defences.conformal import DROP
from foreshot.distillation import KD, Term
from foreshot.errors import ForeshotError, nearest
from foreshot.family import Member, Part
from foreshot.lesson import Views
from foreshot.models import AnyArchitecture, ResNet
from foreshot.schema import annotation_at, members_of, models_of, sentence, spelled_out
from foreshot.training import Training
from foreshot.triggers import AnyTrigger, Dot
from foreshot.yaml_text import read_text, read_yaml

Control = Literal["clean", "trigger_only", "perturbation_only", "noise", "dirty_label"]


class Network(Part):
    """A network and how it is trained.

    Args:
        model: the architecture.
        training: epochs, learning rate, augmentation.
    """

    model: AnyArchitecture = ResNet(depth=8)
    training: Training = Training()


class Surrogate(Network):
    """A teacher of the attacker's own.

    Args:
        data: what it is trained on: the `same` images as the teacher, less the defender's own, or
            `disjoint` ones: half of the training images, which neither the teacher nor the
            transfer set has then.
        with_teacher: the attacker has the teacher as well, and crafts what convinces it and each
            network of an ensemble as one, by the mean of the logs of their probabilities, so that
            a second teacher of the defender's may believe it too. His students learn from the
            teacher alone, as the victim's does.
    """

    data: Literal["same", "disjoint"] = "same"
    with_teacher: bool = False


class Distillation(Part):
    """How the student learns from the teacher.

    Args:
        terms: weighted losses between teacher and student.
        ce_weight: weight of the cross-entropy with the labels of the transfer set; 0 means that
            the student learns from the teacher's answers alone.
        views: does the teacher see the same augmented view as the student (`requery`), or the
            plain image, once (`cached`)? Terms that compare features need the same view of both.
    """

    terms: tuple[Term, ...] = Field(default=(Term(loss=KD()),), min_length=1)
    ce_weight: float = Field(default=0.0, ge=0)
    views: Views = "requery"


class Defender(Part):
    """What a defence has to go on, and how much it may throw away.

    The clean images are taken out of the training split before anybody else sees the transfer set:
    neither attacker nor student has them. Thresholds that are set on them hold if they are drawn
    like the clean images of the transfer set, in all that a screen can tell; as the teacher knows
    those from its training, it is trained on these as well.

    Args:
        clean: number of images that the defender trusts. Half of them are scored, so that the
            lowest p-value is 1 / (clean / 2 + 1). With 0, p-values are guessed.
        labels: whether the transfer set came with labels for the defender to look at. They are
            right where the attack changes images alone, and then give the poison away.
        drop: p-value up to which a screen removes images: with the poison, this share of the clean
            images is lost, whether or not anything is poisoned.
        level: if given, share of clean images to be expected among what is removed instead (false
            discovery rate). A clean set mostly stays whole, but poison is not removed that makes up
            less than a share 2 / (clean * level) of the transfer set.
        remove: share of the transfer set to remove instead, the most suspicious images: where there
            are no clean images that tell how suspicious is too much.
    """

    clean: int = Field(default=500, ge=0)
    labels: bool = False
    drop: float = Field(default=DROP, gt=0, lt=1)
    level: float | None = Field(default=None, gt=0, lt=1)
    remove: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.level is not None and self.remove is not None:
            raise ValueError("expected one of level and remove, found both")
        return self


class Config(Part):
    """One experiment: what is attacked, how, and what is distilled.

    Args:
        seed: every random choice follows from it.
        precision: of training and crafting: auto, float32 or bfloat16.
        data: the dataset; its training split is also the transfer set.
        validation: share of the training split that is held out and evaluated on in place of the
            test split: choose settings with it, and measure with 0, the default.
        teacher: the clean teacher.
        compromise: puts a backdoor into the teacher, a reference point outside the threat model;
            null leaves it clean.
        trigger: the attacker's trigger.
        target: the class that the trigger shall mean.
        attack: how the poison is made.
        surrogate: what the attacker crafts on in the teacher's stead, or beside it; null is the
            teacher itself.
        defence: what is done against the poison, for all students alike; null is nothing.
        defender: what a defence has to go on; without a defence it changes nothing.
        student: the student, and the schedule of the distillation.
        compression: makes the student of the teacher, in place of `student.model`; null does not.
        distillation: losses and view policy.
        controls: students that are distilled beside the poisoned one, each on another attack
            on the same base images; `clean` knows no attack at all, and learns from the teacher
            as it was before any `compromise`.
    """

    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Precision = "auto"
    data: AnyDataset = Signs()
    validation: float = Field(default=0.0, ge=0, lt=1)
    teacher: Network = Network()
    compromise: AnyCompromise | None = None
    trigger: AnyTrigger = Dot()
    target: int = Field(default=0, ge=0)
    attack: AnyAttack = Pgd()
    surrogate: Surrogate | None = None
    defence: AnyDefence | None = None
    defender: Defender = Defender()
    student: Network = Network()
    compression: AnyCompression | None = None
    distillation: Distillation = Distillation()
    controls: tuple[Control, ...] = ("clean", "trigger_only")

    @model_validator(mode="after")
    def _repair_keeps_what_is_pruned(self) -> Self:
        if isinstance(self.defence, Repair) and isinstance(self.compression, Prune):
            raise ValueError(
                "a repair would train the weights that compression prune has set to zero; expected "
                "one of the two"
            )
        return self

    @field_validator("controls")
    @classmethod
    def _each_control_is_one(cls, controls: tuple[Control, ...]) -> tuple[Control, ...]:
        if len(set(controls)) < len(controls):
            raise ValueError("expected each once")
        return controls

    @property
    def split(self) -> str:
        """What models are evaluated on."""
        return "validation" if self.validation else "test"


def presets() -> dict[str, Path]:
    """The presets that come with foreshot, by name."""
    folder = Path(__file__).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(source: str | Path, settings: Sequence[str] = ()) -> Config:
    """The config of a preset or a YAML file, with some keys set by hand.

    Args:
        source: the name of a preset, or the path of a YAML file.
        settings: such as "attack.rate=0.01"; values are YAML. Setting the name of a family's
            member, such as "attack.name=fgsm", drops the parameters that it does not have, or
            that mean something else to it; those of `settings` are its own, in whatever order.
            "attack=fgsm" is short for that, and "defence.name=null" is the same as "defence=null".

    Raises:
        ForeshotError: no such preset or file, no such key, or a value that does not fit.
    """
    known = presets()
    path = known.get(str(source), Path(source))
    if not path.is_file():
        raise ForeshotError(
            f"{source}: expected a preset or a YAML file; {nearest(str(source), known)}"
        )
    return parse(read_text(path), str(source), settings)


def parse(text: str, where: str, settings: Sequence[str] = ()) -> Config:
    """The config that a YAML text describes; see `load_config`."""
    tree = read_yaml(text, where) or {}
    if not isinstance(tree, dict):
        raise ForeshotError(f"{where}: expected keys and values, found {type(tree).__name__}")
    tree = spelled_out(tree, Config)
    for setting in _ordered(map(_by_name, settings)):
        _set(tree, setting)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ForeshotError(f"{where}: {sentence(error, Config)}") from None


def dump(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _set(tree: dict[str, Any], setting: str) -> None:
    """Sets one dotted key in a tree of dicts and lists."""
    key, separator, text = setting.partition("=")
    if not separator:
        raise ForeshotError(f"--set {setting}: expected KEY=VALUE, such as attack.rate=0.01")
    path = key.split(".")
    value = spelled_out(read_yaml(text, f"--set {setting}"), annotation_at(Config, path))
    *parents, last = path
    if value is None and last == "name" and members_of(annotation_at(Config, parents)):
        *parents, last = parents  # no member at all
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                place = ".".join(parents[:depth])
                raise ForeshotError(
                    f"--set {setting}: {place} has {len(node)} items, counted from 0; found {part}"
                )
            node = node[int(part)]
        elif isinstance(node, dict):
            if not isinstance(node.get(part), dict | list):
                node[part] = _default(annotation_at(Config, parents[:depth]), node, part)
            node = node[part]
    if not isinstance(node, dict):
        raise ForeshotError(f"--set {setting}: {'.'.join(parents)} has no keys")
    if last == "name" and node.get("name") != value:
        family = members_of(annotation_at(Config, parents))
        if isinstance(value, str) and value in family:
            before = node.get("name")
            member = family.get(before) if isinstance(before, str) else None
            for stale in [key for key in node if not _kept(key, member, family[value])]:
                del node[stale]
    node[last] = value


def _kept(key: str, before: type[Member] | None, after: type[Member]) -> bool:
    """Whether a parameter means to a member of a family what it meant to the one before.

    It does if both have it from the same class: `weight` is one thing to `counterfactual` and
    another to `dehib`, and a default of a class's own is part of what it is, but for what the
    family shares.
    """
    if key not in after.model_fields:
        return False
    if before is None or key in after.shared:
        return True
    return _declaring(before, key) is _declaring(after, key)


def _declaring(member: type[Member], key: str) -> type | None:
    """The class that says what a parameter of a member is."""
    return next((c for c in member.__mro__ if key in get_annotations(c)), None)


def _by_name(setting: str) -> str:
    """For a member's bare name: "attack=fgsm" is "attack.name=fgsm"."""
    key, _, text = setting.partition("=")
    family = members_of(annotation_at(Config, key.split(".")))
    bare = bool(family) and read_yaml(text, f"--set {setting}") in [*family]
    return f"{key}.name={text}" if bare else setting


def _ordered(settings: Iterable[str]) -> list[str]:
    """Members are named before their parameters are set, in whatever order that is asked for."""
    ordered: list[str] = []
    for setting in settings:
        key = setting.partition("=")[0]
        place = len(ordered)
        if key.endswith(".name"):
            own, keys = key.removesuffix("name"), [s.partition("=")[0] for s in ordered]
            whole = [number for number, other in enumerate(keys) if own.startswith(f"{other}.")]
            begin = whole[-1] + 1 if whole else 0  # what replaces the member stays before
            later = range(begin, place)
            place = next((n for n in later if keys[n].startswith(own) and keys[n] != key), place)
        ordered.insert(place, setting)
    return ordered


def _default(annotation: Any, node: dict[str, Any], part: str) -> Any:
    """The default of one key of a part of the config, as a tree, so that a key of it can be set.

    Args:
        annotation: what may stand there.
        node: what does; its name picks the member of a family.
        part: the key.
    """
    name = node.get("name")
    member = members_of(annotation).get(name) if isinstance(name, str) else None
    models = [member] if member else models_of(annotation)
    field = next((c.model_fields[part] for c in models if part in c.model_fields), None)
    value = field.get_default(call_default_factory=True) if field else None
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return [v.model_dump(mode="json") if isinstance(v, BaseModel) else v for v in value]
    return {}
