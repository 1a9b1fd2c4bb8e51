"""What is compared: the networks of a run, scratch with more compute, ablations of teaching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TEACHERS = ("pt", "mt", "ft")
TAUGHT = "e2e"
SCRATCH = "e2e_scratch"


@dataclass(frozen=True)
class Compute:
    """FLOPs of the base run's training steps.

    Attributes:
        teachers: of pt, mt and ft together.
        students: of m2mkd, all pairs, each counted by itself.
        network: of one end-to-end training.
    """

    teachers: float
    students: float
    network: float

    def epochs(self, base: float, charged: float) -> float:
        """Epochs of a scratch training with `charged` FLOPs more than one of `base` epochs."""
        return round(base * (1 + charged / self.network))


@dataclass(frozen=True)
class Arm:
    """One run beside the base run.

    Attributes:
        name: of its directory.
        title: for the table.
        phase: whose networks are compared.
        keeps: phases that it takes from the base run, finished.
        changes: of the config, by key.
        charged: FLOPs by which its end-to-end training is longer than the base's; None: as long.
        family: of the students that it is for; "": all.
    """

    name: str
    title: str
    phase: str
    keeps: tuple[str, ...] = ()
    changes: tuple[tuple[str, str], ...] = ()
    charged: Callable[[Compute], float] | None = None
    family: str = ""


CONTROLS = (
    Arm(
        "scratch_students",
        "scratch, as long as m2mkd and e2e together (the teacher is given)",
        SCRATCH,
        charged=lambda compute: compute.students,
    ),
    Arm(
        "scratch_all",
        "scratch, as long as pt, mt, ft, m2mkd and e2e together",
        SCRATCH,
        charged=lambda compute: compute.students + compute.teachers,
    ),
    Arm(
        "taught_long",
        "m2mKD, end to end as long as scratch_students",
        TAUGHT,
        (*TEACHERS, "m2mkd"),
        charged=lambda compute: compute.students,
    ),
)
ABLATIONS = (
    Arm(
        "before_ft",
        "taught by modules as before fine-tuning",
        TAUGHT,
        TEACHERS,
        (("distillation.teach_from", "mt"),),
    ),
    Arm(
        "other_modules",
        "taught by another module than their own",
        TAUGHT,
        TEACHERS,
        (("distillation.teacher_of", "(0,2,1,3)"),),
        family="vmoe",
    ),
    Arm(
        "other_modules",
        "taught by another module than their own",
        TAUGHT,
        TEACHERS,
        (("distillation.teacher_of", "(0,4,3,2,1,5)"),),
        family="nac",
    ),
    Arm(
        "keep_stitches",
        "stitches kept end to end",
        TAUGHT,
        TEACHERS,
        (("vmoe.keep_stitches", "True"),),
        family="vmoe",
    ),
    Arm("alpha_0", "labels alone (alpha 0)", TAUGHT, TEACHERS, (("distillation.alpha", "0.0"),)),
    Arm("alpha_1", "teacher alone (alpha 1)", TAUGHT, TEACHERS, (("distillation.alpha", "1.0"),)),
    Arm(
        "alpha_falls",
        "alpha falls from 1 to 0",
        TAUGHT,
        TEACHERS,
        (("distillation.alpha", "1.0"), ("distillation.alpha_end", "0.0")),
    ),
    Arm(
        "tokens",
        "tokens of their modules too (weight 1)",
        TAUGHT,
        TEACHERS,
        (("distillation.token_weight", "1.0"),),
    ),
    Arm("hard", "its likeliest class (hard)", TAUGHT, TEACHERS, (("distillation.kind", "hard"),)),
    Arm(
        "temperature_4",
        "temperature 4",
        TAUGHT,
        TEACHERS,
        (("distillation.temperature", "4.0"),),
    ),
)
ARMS = CONTROLS + ABLATIONS


def arms_of(family: str) -> dict[str, Arm]:
    """The arms of a family, by name."""
    return {arm.name: arm for arm in ARMS if arm.family in ("", family)}
