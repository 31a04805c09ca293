"""What a config amounts to, before anything starts: layout, batch arithmetic, memory, bandwidth.

Reads config.json, tokenizers and safetensors headers only; what they don't tell is ``unknown``.
"""

import yaml
from rich.console import Console
from rich.table import Table

from kdscale.config.schema import RunConfig
from kdscale.data.trial import require_sound
from kdscale.engine.settings import batch_cut, check_settings, student_dtype, topology_of
from kdscale.estimate import (
    ModelFiles,
    cores_and_gpus,
    item_bytes,
    pending_checkpoint,
    read_model,
    student_memory,
    student_parameters,
    teacher_memory,
)
from kdscale.stream.whole import needs_no_teacher
from kdscale.targets.layout import row_bytes

UNKNOWN = "unknown"
_REFERENCE_TOKENS_PER_SECOND = 10_000


def show(config: RunConfig, console: Console) -> None:
    """Print everything about ``config`` that can be known without starting it.

    Raises:
        ConfigError: settings that contradict each other.
        ModelError: the student's own tokenizer cannot be read.
    """
    check_settings(config)
    if config.alignment.tokenizer is not None:
        require_sound(config.alignment.tokenizer)
    teachers = {name: read_model(one.model) for name, one in config.named_teachers.items()}
    teacher = next(iter(teachers.values()))
    console.print("[bold]config[/bold]")
    console.print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), markup=False, highlight=False)
    console.print(_layout(config), _batches(config), _memory(config, teachers), _stream(config, teacher))


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    return table


def _layout(config: RunConfig) -> Table:
    table = _table("ranks")
    student = config.student
    parallel = student.parallel
    ranks = topology_of(parallel).world
    live = not needs_no_teacher(config.targets)
    for name, teacher in config.named_teachers.items():
        sharding = f"ZeRO-3 over {teacher.ranks} ranks" if teacher.ranks > 1 else "one rank, not sharded"
        replicas = f"{teacher.replicas} replicas: " if teacher.replicas > 1 else ""
        each = f"{replicas}{sharding}; {teacher.cpus_per_rank} CPU, {teacher.gpus_per_rank} GPU each"
        each = each if live else f"starts none: targets.source = {config.targets.source}"
        table.add_row(_label(config, name), f"{each}{_part_of(config, name)}")
    table.add_row(
        "student",
        f"{parallel.pipeline} pipeline x {parallel.data} data = {ranks} ranks, ZeRO-{config.zero_stage};"
        f" {student.cpus_per_rank} CPU, {student.gpus_per_rank} GPU each",
    )
    if (writers := config.on_policy) is not None:
        each = f"a whole student each; {writers.cpus_per_rank} CPU, {writers.gpus_per_rank} GPU each"
        table.add_row("rollouts", f"{writers.ranks} ranks, {each}")
    cpus, gpus = cores_and_gpus(config)
    table.add_row("in all", f"{cpus} CPU, {gpus} GPU")
    return table


def _label(config: RunConfig, name: str) -> str:
    return f"teacher {name}" if config.teachers.others else "teacher"


def _part_of(config: RunConfig, name: str) -> str:
    """What of the training text a teacher among several has to say."""
    teachers = config.teachers
    if not teachers.others:
        return ""
    if teachers.combine == "mixture":
        return f"; weight {teachers.weights[name]:g} in the mixture"
    unnamed = ", and those that name none" if name == teachers.default else ""
    return f"; documents with {config.data.teacher_column} = {name}{unnamed}"


def _batches(config: RunConfig) -> Table:
    table, cut, train = _table("batches"), batch_cut(config), config.train
    table.add_row("rows per step", f"{cut.micro_rows} x {cut.micro_steps} micro-steps x {cut.data} ranks = {cut.rows}")
    positions = cut.rows * _positions(config)
    most, unit = ("at most ", "tokens") if config.task == "language-modelling" else ("", "examples")
    table.add_row(f"{unit} per step", f"{most}{positions:,}")
    table.add_row(f"{unit} in all", f"{most}{positions * train.steps:,} in {train.steps} steps")
    return table


def _memory(config: RunConfig, files: dict[str, ModelFiles]) -> Table:
    table = _table("estimated memory (activations not counted)")
    student = config.student
    for name, teacher in config.named_teachers.items() if not needs_no_teacher(config.targets) else ():
        label, width = _label(config, name), item_bytes(teacher.dtype, teacher.gpus_per_rank)
        for what, size in teacher_memory(files[name], teacher.ranks, width).items():
            table.add_row(f"{label}: {what}", _size(size))
        table.add_row(f"{label}: parameters", _count(files[name].parameters))
    parameters, trained = student_parameters(student, next(iter(files.values())), config.alignment)
    table.add_row("student: parameters", f"{_count(parameters)}, {_count(trained)} of them trained")
    if parameters is None or trained is None:
        table.add_row("student: model states per rank", UNKNOWN)
        return table
    width = item_bytes(student_dtype(config), student.gpus_per_rank)
    parallel = student.parallel
    # Stages are dealt out by their trained parameters.
    held, trained_here = parameters // parallel.pipeline, trained // parallel.pipeline
    for name, size in student_memory(held, trained_here, config.zero_stage, parallel.data, width).items():
        table.add_row(f"student: {name}", _size(size))
    pending = pending_checkpoint(parameters, trained, width, pipeline=parallel.pipeline > 1)
    table.add_row("student: host memory of a checkpoint", _size(pending))
    return table


def _stream(config: RunConfig, teacher: ModelFiles) -> Table:
    table = _table("stream")
    if not config.loss.soft:
        table.add_row("payload", "none: loss.hard_weight = 1 trains on labels only")
        return table
    unit, a_unit = ("token", "a token") if config.task == "language-modelling" else ("example", "an example")
    outcomes = teacher.vocab_size if unit == "token" else teacher.num_classes
    if outcomes is None:
        table.add_row(f"bytes per {unit}", UNKNOWN)
        return table
    spec = config.target_spec(0)
    if (spec.payload == "hidden" or spec.layers) and teacher.hidden_size is None:
        table.add_row(f"bytes per {unit}", UNKNOWN)
        return table
    # A mixture is made where it is learned from: every teacher sends its part.
    parts = len(config.named_teachers) if config.teachers.weights else 1
    size = parts * row_bytes(spec, outcomes, teacher.hidden_size or 0)
    per_step = size * config.train.batch_rows * _positions(config)
    in_flight = size * config.train.micro_rows * _positions(config) * config.stream.in_flight
    most = "at most " if spec.payload == "sampled" else ""
    names = {
        "topk": f"top-{spec.k} + tail",
        "sampled": f"at most {spec.k} samples",
        "hidden": "hidden states",
        "dense": "all",
    }
    layers = f", layers {', '.join(map(str, spec.layers))} as {spec.layers_encoding}" if spec.layers else ""
    table.add_row("payload", f"{names[spec.payload]} as {spec.encoding}{layers}, {most}{size} bytes {a_unit}")
    table.add_row("a step", f"at most {_size(per_step)}")
    table.add_row("in flight, per student rank", f"at most {_size(in_flight)}")
    rate = _size(size * _REFERENCE_TOKENS_PER_SECOND)
    table.add_row(f"at {_REFERENCE_TOKENS_PER_SECOND:,} {unit}s/s", f"{rate}/s")
    return table


def _positions(config: RunConfig) -> int:
    """Of a row, at most."""
    return config.data.row_tokens if config.task == "language-modelling" else 1


def _size(size: int | None) -> str:
    if size is None:
        return UNKNOWN
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _count(count: int | None) -> str:
    return UNKNOWN if count is None else f"{count / 1e6:,.1f} M"
