"""The stages of an experiment over the store: each computes one artefact from earlier ones.

No stage knows the one after it. A stage's key is made of the digests of what it reads, the part of
the config that it obeys, and the source that it runs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foreshot.attacks import ATTACKS, Attack, Clean, DirtyLabel
from foreshot.compression.base import trainable
from foreshot.compute import Compute
from foreshot.config import Config, Network
from foreshot.data import ImageSet, Splits
from foreshot.distillation import Distiller
from foreshot.division import Parts, divide
from foreshot.errors import ForeshotError
from foreshot.executor import HERE, Executor
from foreshot.family import Part
from foreshot.files import file_digest, read_json, write_bytes, write_json
from foreshot.inference import logits, pixels, place
from foreshot.lesson import Change, Lesson
from foreshot.metrics import evaluate, stealth
from foreshot.models import ReusedHead, UnanimousNetwork, build
from foreshot.models.base import Architecture, Normalized
from foreshot.models.checkpoint import LoadedModel, load_model, save_model
from foreshot.poison import Poison
from foreshot.progress import Listener
from foreshot.seeding import generator
from foreshot.store import Artefact, Store, content_hash, source_digest, versions
from foreshot.taps import Taps
from foreshot.together import size
from foreshot.training import TRAINING, Samples, Supervised, Training, fit
from foreshot.triggers import Blend, Learned, Trigger
from foreshot.triggers.base import stamp_uint8
from foreshot.triggers.learned import check_picture, save_picture
from foreshot.views import AttackerView

PICTURE = "trigger.png"
"""What a stage calls the pattern that it has learned."""
GLANCE = 500
"""Images that are evaluated after each epoch of a student."""
EXAMPLE = 64
"""Images that show a loss the shapes and the statistics of the features it compares."""
CRAFTING = (
    *TRAINING,
    "adversarial.py",
    "attacks",
    "transforms.py",
    "triggers",
    "data/files.py",
    "distillation",
    "poison.py",
    "views.py",
)
"""Sources that each kind of stage runs, beside those that all do."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A model file and the model in it."""

    artefact: Artefact
    loaded: LoadedModel

    @property
    def model(self) -> Normalized:
        return self.loaded.model

    @property
    def digest(self) -> str:
        return self.artefact.digest

    @property
    def path(self) -> Path:
        return self.artefact.folder / "model.safetensors"


@dataclass(frozen=True, eq=False)
class Guide:
    """What the attacker crafts on, a digest that tells it from others, and the teacher among it."""

    model: nn.Module
    digest: str
    labeller: nn.Module


@dataclass(frozen=True, eq=False)
class Crafted:
    """A poison file and the poison in it."""

    artefact: Artefact
    poison: Poison

    @property
    def path(self) -> Path:
        return self.artefact.folder / "poison.safetensors"


class Stages:
    """What one config's stages are computed with: a store, a device, a listener.

    Args:
        config: the experiment.
        store: where finished stages are.
        compute: device and precision.
        cache: folder for downloads.
        listener: hears of the progress.
        executor: where poison is crafted; it is the same everywhere.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        compute: Compute,
        cache: Path,
        listener: Listener,
        executor: Executor = HERE,
    ) -> None:
        if size() > 1 and any(term.loss.needs_index for term in config.distillation.terms):
            raise ForeshotError(
                "distillation: a loss remembers what it saw of each image; expected one process, "
                f"found {size()} that train together"
            )
        self.config = config
        self.store = store
        self.compute = compute
        self.cache = cache
        self.listener = listener
        self.executor = executor
        self.trigger: Trigger = config.trigger
        self._pattern: Artefact | None = None
        self.attackers: dict[str, Artefact] = {}
        self._known_answers: dict[str, Tensor] = {}

    @cached_property
    def parts(self) -> Parts:
        """Who has which images."""
        return divide(self.config, self.store, self.cache)

    @property
    def data(self) -> Splits:
        """The transfer set and what is evaluated on."""
        return Splits(self.parts.transfer, self.parts.test)

    @cached_property
    def _some(self) -> ImageSet:
        """The images that a student is shown after each epoch, to see what becomes of it."""
        test = self.data.test
        order = torch.randperm(len(test), generator=generator(self.config.seed, "glance"))
        return test.select(order[:GLANCE])

    def _shown(self, count: int) -> Tensor:
        """Places of some images of a set, whichever order it has: at most `EXAMPLE`."""
        random = generator(self.config.seed, "example")
        return torch.randperm(count, generator=random)[:EXAMPLE]

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the data."""
        found = {"train": self.data.train.digest, "test": self.data.test.digest}
        apart = {"surrogate": self.parts.surrogate, "clean": self.parts.clean}
        return found | {name: part.digest for name, part in apart.items() if part is not None}

    def check(self, teacher: Trained | None = None) -> None:
        """Refuses networks, a trigger and an attack that do not fit the data, before any work.

        Args:
            teacher: a file of the user's, in place of the config's.
        """
        train, config = self.data.train, self.config
        for what, network in (("teacher", config.teacher), ("surrogate", config.surrogate)):
            if network is not None and isinstance(network.model, ReusedHead):
                raise ForeshotError(
                    f"{what}.model: expected a network with a classifier of its own, "
                    f"found {network.model.name}"
                )
        parts = [*self._attacking, config.attack, None if config.compression else config.student]
        architecture = teacher.loaded.architecture if teacher else config.teacher.model
        networks = [n for part in parts if part is not None for n in part.outermost(Architecture)]
        with torch.device("meta"):
            built = {
                network: network.build(train.shape, len(train.classes))
                for network in dict.fromkeys([*networks, architecture])
            }
        labels = self.data.test.labels
        if labels is not None and bool((labels == config.target).all()):
            raise ForeshotError(
                f"target: expected test images of other classes than {config.target}, found none"
            )
        nothing = torch.zeros(0)
        pairs = [pair for term in config.distillation.terms for pair in term.at]
        taught = Normalized(built[architecture], nothing, nothing)
        Taps(taught, [layer for _, layer in pairs], "teacher")
        if config.compression:
            config.compression.architecture(architecture)
        else:
            learner = Normalized(built[config.student.model], nothing, nothing)
            Taps(learner, [layer for layer, _ in pairs], "student")
            config.student.model.adopt(learner, taught)
        if isinstance(self.trigger, Learned):  # once there is a teacher
            check_picture(train.shape)
        else:
            stamp_uint8(self.trigger, train.images[:1])
        if not isinstance(config.attack, Clean):
            config.attack.wanted(len(train))

    def teacher(self) -> Trained:
        """The teacher, trained on the labels of the training set."""
        return self.taught(self.config.teacher, "teacher", self.parts.taught)

    def taught(
        self,
        network: Network,
        stage: str,
        data: ImageSet,
        how: Callable[[nn.Module], nn.Module] = Supervised,
        **key: Any,
    ) -> Trained:
        """A network, trained on the labels of its data.

        Args:
            network: architecture and schedule.
            stage: what the listener calls it; its randomness follows from it.
            data: what it is trained on.
            how: makes the network a module that `fit` can train on images and labels `y`.
            key: what `how` depends on, as JSON values.
        """
        labels = _labels(data)

        def train(folder: Path) -> None:
            model = build(network.model, data.images, len(data.classes), self.config.seed, stage)
            samples = Samples(data.images, {"y": labels})
            for number, part in enumerate(network.model.parts(model)):
                part_of = f"{stage} {number + 1}" if number else stage
                self._fit(how(part), samples, network.training, part_of, folder)
            save_model(folder / "model.safetensors", model, network.model, data.shape, data.classes)

        inputs = self.inputs(
            TRAINING,
            [network],
            data=data.digest,
            network=network.model_dump(mode="json", include=set(Network.model_fields)),
            role=stage,
            **key,
        )
        return self.trained(self.store.stage("teacher", inputs, train, stage))

    def compromise(self, teacher: Trained) -> Trained:
        """The teacher with the backdoor in it that the config asks for; its trigger, if learned."""
        wanted, data = self.config.compromise, self.data.train
        assert wanted is not None
        self.learn_trigger(teacher)
        labels = _labels(data)

        def implant(folder: Path) -> None:
            model = trainable(teacher.model)
            view = self._view(teacher, self.listener, self._answers(teacher))
            pattern = wanted.implant(model, view, labels, folder / ".compromise.safetensors")
            architecture = teacher.loaded.architecture
            save_model(folder / "model.safetensors", model, architecture, data.shape, data.classes)
            if pattern is not None:
                save_picture(folder / PICTURE, pattern)

        inputs = self.inputs(
            (*CRAFTING, "compression", "compromises"),
            self._attacking,
            data=self.digests["train"],
            teacher=teacher.artefact.digest,
            compromise=wanted.model_dump(mode="json"),
            **self.stamped(),
        )
        artefact = self.store.stage("compromise", inputs, implant)
        if (artefact.folder / PICTURE).exists():
            self._take_pattern(artefact)
        return self.trained(artefact)

    def learn_trigger(self, teacher: Trained) -> Path | None:
        """Learns the trigger, if it is one that is learned; all later stages put it on images.

        Args:
            teacher: the clean teacher.

        Returns:
            The picture that was learned, now or before.
        """
        wanted, config = self.config.trigger, self.config
        if isinstance(wanted, Learned) and self._pattern is None:
            guide = self._guide(teacher)

            def learn(folder: Path) -> None:
                view = self._view(guide, self.listener, self._answers(guide))
                save_picture(folder / PICTURE, wanted.learn(view))

            inputs = self.inputs(
                CRAFTING,
                self._attacking,
                data=self.digests["train"],
                teacher=guide.digest,
                trigger=wanted.model_dump(mode="json"),
                target=config.target,
            )
            self.attackers["trigger"] = self.store.stage("trigger", inputs, learn)
            self._take_pattern(self.attackers["trigger"])
        return self._pattern and self._pattern.folder / PICTURE

    def poison(
        self,
        teacher: Trained,
        attack: Attack | None = None,
        like: Crafted | None = None,
        label: str = "poison",
    ) -> Crafted:
        """Poison made by an attack with the teacher, or with the surrogate that the config allows.

        Args:
            teacher: the clean teacher.
            attack: what to craft; the config's attack if None.
            like: poison whose base images a control has to take.
            label: what the listener calls it.
        """
        attack = attack or self.config.attack
        config, transfer = self.config, self.data.train
        # Who takes given images, or none, and has nobody to convince, asks no network anything.
        asks = attack.convinces or not (like is not None or isinstance(attack, Clean))
        guide = self._guide(teacher) if asks else teacher

        def craft(folder: Path) -> None:
            view = self._view(
                guide,
                lambda event: self.listener(
                    replace(event, stage=event.stage.replace("poison", label))
                ),
                self._answers(guide) if asks else None,
                None if like is None else like.poison.indices,
            )
            about = {
                "target": config.target,
                "target_class": transfer.classes[config.target],
                "trigger": config.trigger.model_dump(mode="json"),
                "pattern": self._picture,
                "attack": attack.model_dump(mode="json"),
                "transfer_digest": transfer.digest,
            }
            attack.craft(view).save(folder / "poison.safetensors", about)

        inputs = self.inputs(
            CRAFTING,
            [*self._attacking, attack],
            data=self.digests["train"],
            teacher=guide.digest,
            **self.stamped(),
            attack=attack.model_dump(mode="json"),
            like=None if like is None else like.artefact.digest,
        )
        artefact = self.store.stage("poison", inputs, craft, label)
        return Crafted(artefact, Poison.load(artefact.folder / "poison.safetensors", transfer)[0])

    def control(self, name: str, teacher: Trained, poison: Crafted) -> Crafted:
        """The poison of a control: another attack on the same base images."""
        shared = {"epsilon": self.config.attack.epsilon, "trigger": self.config.attack.trigger}
        attack = ATTACKS[name].model_validate({"name": name, **shared})
        like = None if isinstance(attack, Clean) else poison
        return self.poison(teacher, attack, like, f"poison of {name}")

    def student(
        self,
        teacher: Trained,
        poison: Crafted,
        label: str = "student",
        change: Change | None = None,
    ) -> Trained:
        """A student, distilled on the transfer set with the poison in it.

        Args:
            teacher: whom it learns from.
            poison: what lies in the set.
            label: what the listener calls it.
            change: what a defence makes of its lesson.
        """
        network, distillation = self.config.student, self.config.distillation
        compression = self.config.compression

        def train(folder: Path) -> None:
            lesson = self._lesson(teacher, poison)
            if change is not None:
                lesson = change(lesson)
            transfer = lesson.data
            classes = len(transfer.classes)
            # All students start from the same weights and see the same order of images.
            if compression is None:
                architecture = network.model
                model = build(architecture, transfer.images, classes, self.config.seed, "student")
                architecture.adopt(model, teacher.model)
            else:
                architecture = compression.architecture(teacher.loaded.architecture)
                model = compression.start(teacher.model)
            distiller = Distiller(
                place(model, self.compute),
                lesson.teacher,
                distillation.terms,
                distillation.ce_weight,
                example=pixels(transfer.images[self._shown(len(transfer))].to(self.compute.device)),
                samples=len(transfer),
                seed=self.config.seed,
            )
            samples = lesson.samples(distiller, self.compute)
            training = network.training.model_copy(update={"augment": lesson.augment})
            watch = None if self.data.test.labels is None else partial(self._glance, model)
            self._fit(distiller, samples, training, "student", folder, label, watch)
            if compression is not None:
                compression.finish(model)
            save_model(
                folder / "model.safetensors",
                model,
                architecture,
                transfer.shape,
                transfer.classes,
            )

        inputs = self.inputs(
            (*TRAINING, "distillation", "compression", "poison.py", "lesson.py"),
            [self.config.teacher, network],
            data=self.digests["train"],
            teacher=teacher.artefact.digest,
            poison=poison.poison.digest,
            network=network.model_dump(mode="json"),
            compression=compression and compression.model_dump(mode="json"),
            distillation=distillation.model_dump(mode="json"),
            **({} if change is None else change.key),
        )
        return self.trained(self.store.stage("student", inputs, train, label))

    def _lesson(self, teacher: Trained, poison: Crafted) -> Lesson:
        """The whole transfer set with the poison in it, as the config has it taught."""
        augment, views = self.config.student.training.augment, self.config.distillation.views
        answers = None
        if views == "cached" or augment == "none":
            clean = self._answers(teacher)
            answers = poison.poison.answers(clean, teacher.model, self.compute)
        return Lesson(
            data=poison.poison.apply(self.data.train),
            teacher=teacher.model,
            augment=augment,
            views=views,
            dictated=poison.poison.dictated(len(self.data.train)),
            answers=answers,
        )

    def evaluation(
        self, teacher: Trained, poison: Crafted, students: Mapping[str, Trained]
    ) -> tuple[dict[str, Any], float]:
        """Rates of the teacher and of every student, and the stealth of the poison."""
        config = self.config

        def measure(folder: Path) -> None:
            models = {"teacher": teacher, **students}
            result: dict[str, Any] = {
                name: self.evaluate(trained.model, self.data.test)
                for name, trained in models.items()
            }
            result["poison"] = stealth(
                poison.poison,
                self.data.train,
                self.trigger,
                config.target,
                teacher.model,
                self.compute,
                config.attack.stamps,
            )
            write_json(folder / "evaluation.json", result)

        inputs = self.inputs(
            (
                "metrics.py",
                "compute.py",
                "inference.py",
                "levels.py",
                "triggers",
                "data/files.py",
                "models",
                "seeding.py",
                "taps.py",
            ),
            data=self.digests,
            teacher=teacher.artefact.digest,
            students={name: trained.artefact.digest for name, trained in students.items()},
            poison=poison.artefact.digest,
            **self.stamped(),
            stamps=config.attack.stamps,
        )
        artefact = self.store.stage("evaluate", inputs, measure)
        return read_json(artefact.folder / "evaluation.json"), artefact.seconds

    def evaluate(self, model: nn.Module, test: ImageSet) -> dict[str, Any]:
        """The one evaluator, with this experiment's trigger and target."""
        return evaluate(model, test, self.trigger, self.config.target, self.compute)

    def adopt_model(self, path: Path) -> Trained:
        """A model from a file of the user's, in place of one that a stage would train."""
        loaded = load_model(path)
        if (loaded.shape, loaded.classes) != (self.data.train.shape, self.data.train.classes):
            raise ForeshotError(
                f"{path}: expected a model of {self.data.train.shape} images and "
                f"{len(self.data.train.classes)} classes as in the dataset "
                f"{self.config.data.model_dump()['name']!r}, found {loaded.shape} images and "
                f"{len(loaded.classes)} classes"
                + (" of other names" if len(loaded.classes) == len(self.data.train.classes) else "")
            )

        def keep(folder: Path) -> None:
            write_bytes(folder / "model.safetensors", path.read_bytes())

        return self.trained(self.store.stage("adopted", {"file": file_digest(path)}, keep))

    def adopt_trigger(self, picture: Path | None) -> None:
        """A pattern that was learned before, if the trigger is one that is learned."""
        if picture is not None and isinstance(self.config.trigger, Blend):
            self.trigger = self.config.trigger.learned(picture)

    def adopt_poison(self, path: Path) -> Crafted:
        """Poison from a file of the user's, in place of what the attack would craft."""
        poison, about = Poison.load(path, self.data.train)
        wanted = self.config.model_dump(mode="json", include={"target", "trigger"})
        for key, expected in (wanted | {"pattern": self._picture}).items():
            if about.get(key) != expected:
                raise ForeshotError(
                    f"{path}: expected poison for {key} {expected}, found {about.get(key)}"
                )
        made, given = self.config.attack, about.get("attack")
        name = given.get("name") if isinstance(given, dict) else None
        if isinstance(name, str) and name in ATTACKS and name != made.title:
            raise ForeshotError(
                f"{path}: expected poison of {made.title}, as the config says, found poison of "
                f"{name}; --set attack.name={name} says so"
            )
        if poison.labels is not None and not isinstance(made, DirtyLabel):
            raise ForeshotError(
                f"{path}: expected poison that the teacher labels, found labels of its own; "
                "--set attack.name=dirty_label says so"
            )
        if len(poison) and isinstance(made, Clean):
            raise ForeshotError(f"{path}: expected no poison, as the config says, found some")

        def keep(folder: Path) -> None:
            write_bytes(folder / "poison.safetensors", path.read_bytes())

        return Crafted(self.store.stage("adopted", {"file": file_digest(path)}, keep), poison)

    @property
    def _attacking(self) -> list[Part | None]:
        """What of the config has the networks that the attacker runs, beside those of attacks."""
        config = self.config
        return [config.teacher, config.surrogate, config.trigger, config.compromise]

    @property
    def _picture(self) -> str | None:
        """SHA-256 of the pattern that was learned, if the trigger is one that is learned."""
        return self._pattern and self._pattern.digests[PICTURE]

    def _guide(self, teacher: Trained) -> Trained | Guide:
        """What the attacker crafts on: the teacher, the surrogate of the config, or both."""
        wanted = self.config.surrogate
        if wanted is None:
            return teacher
        images = self.parts.surrogate or self.data.train
        own = self.taught(wanted, "surrogate", images)
        self.attackers["surrogate"] = own.artefact
        if not wanted.with_teacher:
            return own
        every = UnanimousNetwork([teacher.model, *wanted.model.parts(own.model)])
        return Guide(every, content_hash([teacher.digest, own.digest]), teacher.model)

    def _take_pattern(self, artefact: Artefact) -> None:
        """From now on the trigger is the pattern that a stage has learned."""
        self._pattern = artefact
        self.adopt_trigger(artefact.folder / PICTURE)

    def _view(
        self,
        guide: Trained | Guide,
        listener: Listener,
        answers: Tensor | None,
        bases: Tensor | None = None,
    ) -> AttackerView:
        return AttackerView(
            images=self.data.train.images,
            teacher=guide.model,
            trigger=self.trigger,
            target=self.config.target,
            seed=self.config.seed,
            compute=self.compute,
            bases=bases,
            teacher_logits=answers,
            labeller=guide.labeller if isinstance(guide, Guide) else None,
            listener=listener,
            executor=self.executor,
        )

    def stamped(self) -> dict[str, Any]:
        """What triggered images depend on."""
        return {
            "trigger": self.config.trigger.model_dump(mode="json"),
            "pattern": self._pattern and self._pattern.digest,
            "target": self.config.target,
        }

    def _fit(
        self,
        module: nn.Module,
        samples: Samples,
        training: Training,
        stage: str,
        folder: Path,
        label: str | None = None,
        watch: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        fit(
            module,
            samples,
            training,
            self.compute,
            seed=self.config.seed,
            stage=stage,
            label=label,
            listener=self.listener,
            checkpoint=folder / f".{stage}.safetensors",
            watch=watch,
        )

    def _glance(self, model: nn.Module) -> dict[str, float]:
        """Clean accuracy and ASR in percent, on some of the images to evaluate on."""
        rates = self.evaluate(model, self._some)
        found = {"clean accuracy": rates["clean_accuracy"], "ASR": rates["asr"]}
        return {name: 100 * of["value"] for name, of in found.items() if of["total"]}

    def _answers(self, teacher: Trained | Guide) -> Tensor:
        """What a teacher says of the plain transfer set; asked once, for attack and students."""
        known = self._known_answers
        if teacher.digest not in known:
            known.clear()
            known[teacher.digest] = logits(teacher.model, self.data.train.images, self.compute)
        return known[teacher.digest]

    def trained(self, artefact: Artefact) -> Trained:
        loaded = load_model(artefact.folder / "model.safetensors")
        place(loaded.model, self.compute)
        return Trained(artefact, loaded)

    def inputs(
        self, sources: tuple[str, ...], networks: Iterable[Part | None] | None = None, **inputs: Any
    ) -> dict[str, Any]:
        """A stage's inputs, with what all stages depend on.

        Args:
            sources: modules and packages that it runs.
            networks: the parts of the config that hold the networks it runs; None is all of it.
            inputs: what else decides what comes out, as JSON values.
        """
        parts = [part for part in networks or [self.config] if part is not None]
        built = [network for part in parts for network in part.outermost(Architecture)]
        common = {
            "seed": self.config.seed,
            "source": source_digest("stages.py", "data/base.py", *sources),
            "versions": versions(*sorted({name for each in built for name in each.packages})),
        }
        return {**inputs, **common, **self.compute.describe()}


def _labels(data: ImageSet) -> Tensor:
    if data.labels is None:
        raise ForeshotError("data: expected labels to train a teacher on, found none")
    return data.labels
