"""What fine-tuning means, laid over a config: a student from a directory, the true labels alone, no teacher."""

from pathlib import Path
from typing import Any

from kdscale.config.load import Given, checked, read_fields
from kdscale.config.schema import RunConfig
from kdscale.errors import ConfigError

_LOSS = ("hard_weight", "chunk_mib")
"""What of the loss is left without a teacher."""


def load_finetune(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Like ``load_config``, of a config that says nothing of a teacher.

    Raises:
        ConfigError: also for what contradicts fine-tuning.
    """
    given = read_fields(path, overrides)
    _require_no_teacher(given)
    student = {"init": "model", **_section(given, "student")}
    if student["init"] != "model" or not student.get("model"):
        raise ConfigError(
            f"{_place(given, 'student')}: student.init = {student['init']}, student.model = {student.get('model')}: fine-tuning"
            " starts from a model directory; set student.model, for instance to the student/ of a run"
        )
    laid_over = {
        "student": student,
        # Whose tokenizer the text is read with.
        "teacher": {"model": student["model"]},
        "targets": {"source": "none"},
        "loss": {"hard_weight": 1.0, **_section(given, "loss")},
    }
    return checked(given.fields | laid_over, given)


def _require_no_teacher(given: Given) -> None:
    for name in ("teacher", "teachers", "targets"):
        if given.fields.get(name) is not None:
            raise ConfigError(
                f"{_place(given, name)}: {name}: fine-tuning learns from the true labels alone; remove the section (or set"
                f" {name}=null), or use `kdscale train`"
            )
    loss = _section(given, "loss")
    if unread := [name for name in loss if name not in _LOSS]:
        raise ConfigError(
            f"{_place(given, f'loss.{unread[0]}')}: loss.{unread[0]} is about what is learned from a teacher, and fine-tuning"
            " has none; remove it, or use `kdscale train`"
        )
    if loss.get("hard_weight", 1) != 1:
        raise ConfigError(
            f"{_place(given, 'loss.hard_weight')}: loss.hard_weight = {loss['hard_weight']}: fine-tuning learns from the true"
            " labels alone; remove it, or use `kdscale train`"
        )


def _section(given: Given, name: str) -> dict[str, Any]:
    section = given.fields.get(name)
    if section is not None and not isinstance(section, dict):
        raise ConfigError(f"{_place(given, name)}: {name} = {section!r} is no section of settings")
    return section or {}


def _place(given: Given, name: str) -> str:
    return given.places.get(name, str(given.path))
