"""The engineer's doors: is a set poisoned, is a student?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from foreshot.cli.common import DeviceName, listening

if TYPE_CHECKING:
    from foreshot.audit.job import Job, StudentJob

Broken = Annotated[
    Literal["skip", "refuse"], typer.Option(help="What to do about files that are no pictures.")
]
Out = Annotated[Path | None, typer.Option(help="Report folder; audits/NAME if not given.")]

commands = typer.Typer(no_args_is_help=True, help="Look for poison in what is yours.")


@commands.command("data")
def audit_data(
    source: Annotated[
        Path, typer.Argument(metavar="DIR|FILE", help="Pictures, or a safetensors file.")
    ],
    teacher: Annotated[
        Path, typer.Option(help="The model that will label them: a model file, or weights.")
    ],
    architecture: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What the weights are for, such as timm; or YAML."),
    ] = None,
    size: Annotated[
        int, typer.Option(min=8, max=1024, help="Pixels a side, for weights with --architecture.")
    ] = 224,
    clean: Annotated[
        Path | None, typer.Option(metavar="DIR|FILE", help="Images that you know to be clean.")
    ] = None,
    second: Annotated[
        Path | None, typer.Option(help="Another model file, trained apart from the teacher.")
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Folders are classes; compare with the teacher's.")
    ] = False,
    screens: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Which screens; all that can be had.")
    ] = None,
    distil: Annotated[
        bool, typer.Option("--distil", help="Distil a student on the set, for screens to look at.")
    ] = False,
    alarm: Annotated[
        float, typer.Option(min=0.001, max=0.5, help="Largest share of false alarms.")
    ] = 0.05,
    drop: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of clean images to lose with the poison.")
    ] = 0.02,
    broken: Broken = "skip",
    out: Out = None,
    write_clean: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what is not suspicious there.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the screens' random numbers.")] = 0,
    device: DeviceName = "auto",
) -> None:
    """Screen a transfer set with the teacher that will label it.

    The exit code is 0 if it looks clean, 1 if it is suspicious, and 2 for an error, or where so few
    images cannot tell. Run the same command again to go on after an interruption.

        foreshot audit data pictures --teacher teacher.safetensors --clean trusted
        foreshot audit data set.safetensors --teacher teacher.safetensors --write-clean kept
        foreshot audit data pictures --teacher teacher.safetensors --clean trusted --distil
        foreshot audit data pictures --teacher resnet.safetensors --architecture timm
    """
    from foreshot.audit.job import Job

    job = Job(
        source=source,
        teacher=teacher,
        architecture=architecture,
        size=size,
        clean=clean,
        second=second,
        labels=labels,
        screens=tuple(screens.split(",")) if screens else (),
        distil=distil,
        alarm=alarm,
        drop=drop,
        broken=broken,
        out=out,
        write_clean=write_clean,
        seed=seed,
        device=device,
    )
    _audit(job)


@commands.command("student")
def audit_student(
    student: Annotated[Path, typer.Argument(help="A model file of foreshot's, or weights.")],
    teacher: Annotated[Path, typer.Option(help="Its teacher, or another that you trust.")],
    clean: Annotated[
        Path, typer.Option(metavar="DIR|FILE", help="Images that you know to be clean.")
    ],
    student_architecture: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What the student's weights are for, such as timm."),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(metavar="NAME", help="The same for the teacher's; or YAML.")
    ] = None,
    size: Annotated[
        int, typer.Option(min=8, max=1024, help="Pixels a side, for weights with an architecture.")
    ] = 224,
    alarm: Annotated[float, typer.Option(min=0.001, max=0.5, help="Share of false alarms.")] = 0.05,
    broken: Broken = "skip",
    out: Out = None,
    seed: Annotated[int, typer.Option(help="Of the search's random numbers.")] = 0,
    device: DeviceName = "auto",
) -> None:
    r"""Look for a trigger that turns the student and not its teacher.

    For each class it seeks the smallest change, the same for all images, that makes the student
    say this class. A few hundred clean images are enough. The exit code is 0 if the student looks
    clean, 1 if it is suspicious, and 2 for an error. Run the same command again to go on after an
    interruption.

        foreshot audit student student.safetensors --teacher teacher.safetensors --clean trusted
        foreshot audit student student.safetensors --teacher big.safetensors --clean trusted \
            --architecture "{name: timm, model: resnet50}"
    """
    from foreshot.audit.job import StudentJob

    job = StudentJob(
        student=student,
        teacher=teacher,
        clean=clean,
        student_architecture=student_architecture,
        architecture=architecture,
        size=size,
        alarm=alarm,
        broken=broken,
        out=out,
        seed=seed,
        device=device,
    )
    _audit(job)


def _audit(job: "Job | StudentJob") -> None:
    with listening() as listener:
        report = job.run(listener)
    report.print()
    code = {"clean": 0, "suspicious": 1, "none": 2}[report.audit.verdict]
    raise typer.Exit(code)
