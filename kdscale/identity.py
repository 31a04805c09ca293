"""What a checkpoint belongs to, and what may differ when a run goes on from it. Pure: no torch.

An identity is a flat mapping from dotted names to plain values. Every setting is of one kind:

    meaning    another value is another run: refused, unless the name is allowed
    student    decides which parameters there are: refused always
    rounding   the same mathematics in another order of additions: free, but refused in deterministic mode unless allowed
    free       changes no number of the training; not part of the identity
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from kdscale.config.schedule import Schedule
from kdscale.config.schema import RunConfig
from kdscale.errors import CheckpointError, ConfigError

Kind = Literal["meaning", "student", "rounding", "free"]
_KINDS: dict[str, Kind] = {
    # Another head has other parameters.
    "task": "student",
    "run.name": "free",
    "run.dir": "free",
    "run.seed": "meaning",
    "run.deterministic": "rounding",
    # Text and tokenizer count by their content (`corpus`, `tokenizer`), wherever they lie.
    "data.train": "free",
    "data.heldout": "free",
    "data.tokenizer": "free",
    "data.cache_dir": "free",
    "data": "meaning",
    # The same for models (`teacher`, `student.files`).
    "teacher.model": "free",
    "teacher.dtype": "meaning",
    "teacher.ranks": "rounding",
    "teacher.max_batch_tokens": "rounding",
    "teacher.cpus_per_rank": "rounding",
    "teacher.gpus_per_rank": "rounding",
    "teacher.start_seconds": "free",
    "teacher.placement": "free",
    "teacher.nodes": "free",
    "teacher.replicas": "rounding",
    "teacher.heartbeat_seconds": "free",
    "teacher.restarts": "free",
    "teacher.restart_wait_seconds": "free",
    "teacher.restart_forget_seconds": "free",
    # Each of the others like the main one, see `kind_of`.
    "teachers": "meaning",
    "student.model": "free",
    "student.files": "student",
    "student.init": "student",
    "student.layers": "student",
    "student.config": "student",
    "student.freeze": "student",
    "student.lora": "student",
    # Master weights are float32 whatever the model computes in, so another dtype can go on from them.
    "student.dtype": "meaning",
    "student.parallel": "rounding",
    "student.cpus_per_rank": "rounding",
    "student.gpus_per_rank": "rounding",
    "student.activation_checkpointing": "rounding",
    "student.start_seconds": "free",
    "student.collective_seconds": "free",
    "student.placement": "free",
    "student.nodes": "free",
    "student.heartbeat_seconds": "free",
    "student.restarts": "free",
    "student.restart_wait_seconds": "free",
    "student.restart_forget_seconds": "free",
    # A recording counts by its provenance, which must be this run's.
    "targets.source": "free",
    "targets.recording": "free",
    "targets": "meaning",
    "loss.chunk_mib": "rounding",
    # They decide which projections there are.
    "loss.layers.pairs": "student",
    "loss.layers.projection": "student",
    "loss": "meaning",
    # Counts by its content (`student_tokenizer`).
    "alignment.tokenizer": "free",
    "alignment": "meaning",
    "train.micro_rows": "rounding",
    "train": "meaning",
    # How states are spread and moved. What kdscale derives (batch sizes, optimizer, bf16) stands under its own names.
    "deepspeed.zero_optimization": "rounding",
    "deepspeed.train_batch_size": "free",
    "deepspeed.train_micro_batch_size_per_gpu": "free",
    "deepspeed.gradient_accumulation_steps": "free",
    "deepspeed.gradient_clipping": "free",
    "deepspeed.optimizer": "free",
    "deepspeed.bf16": "free",
    "deepspeed.steps_per_print": "free",
    "deepspeed.wall_clock_breakdown": "free",
    "deepspeed": "meaning",
    "stream": "free",
    # What was generated is text like any other, and counts by its content.
    "generate": "free",
    "on_policy.heldout_prompts": "free",
    "on_policy.batch_rows": "rounding",
    # A step's text is written by one rank, whichever.
    "on_policy.ranks": "free",
    "on_policy.cpus_per_rank": "rounding",
    "on_policy.gpus_per_rank": "rounding",
    "on_policy.start_seconds": "free",
    "on_policy.heartbeat_seconds": "free",
    "on_policy.restarts": "free",
    "on_policy.restart_wait_seconds": "free",
    "on_policy.restart_forget_seconds": "free",
    "on_policy.give_up_seconds": "free",
    "on_policy": "meaning",
    "checkpoint": "free",
    "export": "free",
    "evaluate": "free",
    "cluster": "free",
    # What only a prepared run and its ranks know.
    "teacher": "meaning",
    "tokenizer": "meaning",
    "student_tokenizer": "student",
    "corpus": "meaning",
    "environment": "rounding",
}
"""By name or by the section it stands in; the longest name that fits decides."""
_EXPLAINED = {
    "teacher": "the files of teacher.model",
    "tokenizer": "the content of the tokenizer, or of preprocessor_config.json",
    "student_tokenizer": "the content of alignment.tokenizer",
    "corpus": "the tokenized text of data.train and data.heldout",
    "student.files": "the files of student.model",
}
ENVIRONMENT = tuple(
    f"environment.{name}"
    for name in ("python", "kdscale", "torch", "deepspeed", "transformers", "processor", "threads", "device")
)
"""What ``kdscale.engine.environment`` records. Differing only warns, but in deterministic mode it counts as rounding."""
_ABSENT = "nothing"


def kind_of(name: str) -> Kind:
    """The kind of a setting by its dotted name; one that is not listed counts as meaning."""
    parts = name.split(".")
    if parts[:2] == ["teachers", "others"] and len(parts) > 3:
        parts = ["teacher", *parts[3:]]
    for length in range(len(parts), 0, -1):
        if (kind := _KINDS.get(".".join(parts[:length]))) is not None:
            return kind
    return "meaning"


def settings(config: RunConfig) -> dict[str, Any]:
    """The settings of ``config`` that are part of a run's identity, as plain values by dotted name.

    ``train.steps`` is among them only where something is scheduled over the steps: at a constant rate, a run of more steps
    begins with the very steps of a shorter one.
    """
    found = {name: value for name, value in _leaves(config) if kind_of(name) != "free"}
    # Only what the payload uses, and nothing when no step learns from the teacher.
    found = {name: value for name, value in found.items() if not name.startswith("targets.")}
    if config.loss.soft:
        spec = config.target_spec(0).as_dict()
        found |= {f"targets.{name}": spec[name] for name in ("payload", "k", "encoding", "sampler")}
    if not scheduled(config):
        del found["train.steps"]
    if config.alignment.method is None:
        found = {name: value for name, value in found.items() if not name.startswith("alignment.")}
    if config.student.lora is None:
        del found["student.lora"]
    if not config.teachers.others:
        found = {name: value for name, value in found.items() if not name.startswith("teachers.")}
    if config.data.teacher_column is None:
        del found["data.teacher_column"]
    if config.on_policy is None:
        del found["on_policy"]
    if config.loss.layers is None:
        del found["loss.layers"]
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def scheduled(config: RunConfig) -> bool:
    """Whether any value moves over the steps of the run."""
    values = [getattr(config.loss, name) for name in type(config.loss).model_fields]
    if config.loss.layers is not None:
        values.append(config.loss.layers.weight)
    return config.train.schedule != "constant" or any(isinstance(value, Schedule) for value in values)


def names(config: RunConfig) -> list[str]:
    """All settings of ``config`` by dotted name."""
    return [name for name, _ in _leaves(config)]


def _leaves(part: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in type(part).model_fields:
        value = getattr(part, field)
        name = f"{prefix}{field}"
        if isinstance(value, BaseModel) and not isinstance(value, Schedule):
            yield from _leaves(value, f"{name}.")
        elif isinstance(value, dict) and any(isinstance(one, BaseModel) for one in value.values()):
            for key, one in value.items():
                yield from _leaves(one, f"{name}.{key}.")
        elif name == "deepspeed":
            yield from _flat(value, "deepspeed.")
        else:
            yield name, value.model_dump(mode="json") if isinstance(value, Schedule) else value


def _flat(fields: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _explained(name: str) -> str | None:
    if name.startswith("teachers.others.") and name.count(".") == 2:
        return f"the files of {name}.model"
    return _EXPLAINED.get(name)


@dataclass(frozen=True)
class Change:
    """One setting that is not what it was when the checkpoint was written."""

    name: str
    then: Any
    now: Any
    kind: Kind

    def line(self) -> str:
        what = f" ({explained})" if (explained := _explained(self.name)) else ""
        return f"{self.name}{what}: checkpoint {self.then!r}, now {self.now!r}"


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between two identities, by name; ``nothing`` stands for a name that only the other one has."""
    both = sorted(then.keys() | now.keys())
    pairs = [(name, then.get(name, _ABSENT), now.get(name, _ABSENT)) for name in both]
    return [Change(name, old, new, kind_of(name)) for name, old, new in pairs if old != new]


def require_resumable(
    where: str, found: Iterable[Change], *, deterministic: bool, allowed: Iterable[str]
) -> list[Change]:
    """The changes a run may go on with, of those it has.

    Args:
        where: the checkpoint, for the message.
        allowed: names, or sections of names, whose change was asked for.

    Raises:
        CheckpointError: listing every change that may not be, and the way out.
    """
    found, allowed = list(found), tuple(allowed)
    refused = [change for change in found if not _may_be(change, deterministic=deterministic, allowed=allowed)]
    if not refused:
        return found
    listed = "".join(f"\n  {change.line()}" for change in refused)
    allowable = [change.name for change in refused if change.kind != "student"]
    ways = ["change them back", "give the run another name (run.name=...)", "start over with --resume never"]
    if len(allowable) == len(refused):
        ways.append(f"or go on all the same with --allow-changed {','.join(allowable)}")
    reason = ""
    if any(change.kind == "rounding" for change in refused):
        reason = " (run.deterministic = true: what changes rounding counts too)"
    if any(change.kind == "student" for change in refused):
        reason += " (the checkpoint holds other parameters than this student's)"
    raise CheckpointError(f"{where} belongs to a run with other settings{reason}:{listed}\n{'; '.join(ways)}")


def _may_be(change: Change, *, deterministic: bool, allowed: tuple[str, ...]) -> bool:
    named = any(change.name == name or change.name.startswith(f"{name}.") for name in allowed)
    match change.kind:
        case "free":
            return True
        case "student":
            return False
        case "rounding":
            return named or not deterministic
        case "meaning":
            return named


def require_known(allowed: Iterable[str], known: Iterable[str]) -> None:
    """Raises: ConfigError for a name in ``checkpoint.allow_changed`` that is neither a known one nor a section of some."""
    whole = set(known)
    sections = {name.rsplit(".", n)[0] for name in whole for n in range(1, name.count(".") + 1)}
    for name in allowed:
        if name in whole | sections:
            continue
        near = difflib.get_close_matches(name, sorted(whole), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "see the names a refusal lists"
        raise ConfigError(f"checkpoint.allow_changed = {name}: no setting of that name; {hint}")
