"""Several teachers of one run: which document goes to whom, or in what proportion they are mixed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kdscale.config.section import Section
from kdscale.config.sections import TeacherSection
from kdscale.errors import ConfigError

if TYPE_CHECKING:
    from kdscale.config.schema import RunConfig

TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
ALONE = "teacher"
"""What the only teacher of a run is called."""
_CARRIED = {"routing": ("topk", "sampled", "dense"), "mixture": ("sampled", "dense")}
"""Payloads by ``combine``. hidden: a student holds one head; a mixture of top-k lists knows no tail of its own."""


class TeachersSection(Section):
    """Further teachers beside ``teacher``, each with ranks and replicas of its own, all with its tokenizer."""

    main: TeacherName = "main"
    """What ``teacher`` is called among them."""
    others: dict[TeacherName, TeacherSection] = Field({})
    """By name: sections like ``teacher``. Empty: ``teacher`` is the only one."""
    combine: Literal["routing", "mixture"] = "routing"
    """routing: each document goes to the teacher that its ``data.teacher_column`` names; mixture: every token gets the mean of
    all teachers' distributions by ``weights`` (``targets.payload: dense``, exact, or ``sampled``, without bias)."""
    default: TeacherName | None = None
    """With routing: the teacher of documents that name none; without one they are refused."""
    weights: dict[TeacherName, float] = Field({})
    """With mixture: each teacher's share, above 0; together 1."""


@dataclass(frozen=True)
class Routing:
    """How documents find their teacher."""

    column: str
    names: tuple[str, ...]
    """Of all teachers; a document's route is the place of its teacher here."""
    default: str | None


def require_combinable(config: "RunConfig") -> None:
    """Raises: ValueError for teachers that cannot work together, or settings that nothing would read."""
    teachers, column = config.teachers, config.data.teacher_column
    if not teachers.others:
        if unread := [name for name in ("default", "weights") if getattr(teachers, name)]:
            raise ValueError(f"teachers.{unread[0]} is not read: there is one teacher; name more in teachers.others")
        if column is not None:
            raise ValueError(
                f"data.teacher_column = {column}: there is one teacher, and all documents go to it; name more in"
                " teachers.others, or remove it"
            )
        return
    names, combine, payload = tuple(config.named_teachers), teachers.combine, config.targets.payload
    if teachers.main in teachers.others:
        raise ValueError(f"teachers.main = {teachers.main} is a name in teachers.others too; choose another")
    if config.task != "language-modelling":
        raise ValueError(
            f"task = {config.task} has one teacher; remove teachers.others, or use task: language-modelling"
        )
    if config.targets.source != "live":
        raise ValueError(
            f"targets.source = {config.targets.source}: several teachers are asked live; use targets.source: live, or one"
            " teacher"
        )
    if config.loss.soft and payload not in _CARRIED[combine]:
        raise ValueError(
            f"targets.payload = {payload} cannot be had by teachers.combine = {combine}; use targets.payload ="
            f" {' or '.join(_CARRIED[combine])}"
        )
    (_require_routes if combine == "routing" else _require_weights)(config, names)


def require_one_teacher(config: "RunConfig", what: str) -> None:
    """Raises: ConfigError."""
    if config.teachers.others:
        raise ConfigError(
            f"{what} asks one teacher, and there are {', '.join(config.named_teachers)}; choose it with teachers={{}}"
            " data.teacher_column=null teacher.model=..."
        )


def require_named(config: "RunConfig", given: Iterable[str], what: str) -> None:
    """Whether the config has teachers of the ``given`` names. Raises: ConfigError."""
    try:
        _require_known(what, given, tuple(config.named_teachers))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _require_routes(config: "RunConfig", names: tuple[str, ...]) -> None:
    teachers, data = config.teachers, config.data
    if data.teacher_column is None:
        raise ValueError(
            "teachers.combine = routing needs data.teacher_column, the field of a document that names its teacher"
        )
    if teachers.weights:
        raise ValueError("teachers.weights is not read: with teachers.combine = routing each document has one teacher")
    if teachers.default is not None:
        _require_known("teachers.default", [teachers.default], names)
    if data.packing == "joined":
        raise ValueError(
            "data.packing = joined: documents see each other there, and each may have another teacher; use isolated or off"
        )


def _require_weights(config: "RunConfig", names: tuple[str, ...]) -> None:
    teachers, weights, loss = config.teachers, config.teachers.weights, config.loss
    if loss.soft and loss.divergence == "logit_mse" and loss.temperature != 1:
        raise ValueError(
            f"loss.divergence = logit_mse compares logits at temperature 1, and at loss.temperature = {loss.temperature} a"
            " mixture of teachers has none; use loss.temperature: 1"
        )
    for setting, value in (("data.teacher_column", config.data.teacher_column), ("teachers.default", teachers.default)):
        if value is not None:
            raise ValueError(
                f"{setting} = {value} is not read: with teachers.combine = mixture all documents go to all"
            )
    _require_known("teachers.weights", weights, names)
    if missing := [name for name in names if name not in weights]:
        raise ValueError(f"teachers.weights has none for {', '.join(missing)}; every teacher needs its share")
    if min(weights.values()) <= 0 or not math.isclose(sum(weights.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"teachers.weights = {weights}: shares must be above 0 and sum to 1")


def _require_known(setting: str, given: Iterable[str], names: tuple[str, ...]) -> None:
    for name in given:
        if name not in names:
            raise ValueError(f"{setting}: no teacher is called {name}; there are {', '.join(names)}")
