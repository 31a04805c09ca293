"""What a config amounts to, before anything starts: layout, batch arithmetic, memory, bandwidth.

Reads config.json, tokenizer.json and safetensors headers only; what they don't tell is ``unknown``.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from kdscale.config.hardware import cpu_has_bfloat16
from kdscale.config.schema import Dtype, RunConfig, StudentSection
from kdscale.engine.settings import batch_cut
from kdscale.losses.objective import check_support
from kdscale.targets.codec import topk_bytes

UNKNOWN = "unknown"
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_REFERENCE_TOKENS_PER_SECOND = 10_000


@dataclass(frozen=True)
class ModelFiles:
    """What a local model directory says of itself; ``None`` where it does not."""

    parameters: int | None = None
    file_bytes: int | None = None
    tensors: dict[str, int] | None = None
    """Elements by tensor name."""
    vocab_size: int | None = None
    hidden_size: int | None = None

    @property
    def largest_gathered(self) -> int | None:
        """Elements of the largest layer or embedding: what ZeRO-3 holds whole at a time."""
        if not self.tensors:
            return None
        groups: dict[str, int] = {}
        for name, elements in self.tensors.items():
            layer = _LAYER.search(name)
            key = f"layer {layer.group(1)}" if layer else name
            groups[key] = groups.get(key, 0) + elements
        return max(groups.values())


def read_model(name: str | None) -> ModelFiles:
    """Facts of a local directory; nothing for hub names and missing directories."""
    directory = Path(name) if name else None
    if directory is None or not directory.is_dir():
        return ModelFiles()
    config = _json(directory / "config.json")
    config = config.get("text_config", config)
    tensors: dict[str, int] = {}
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        tensors |= {key: math.prod(one["shape"]) for key, one in header.items() if key != "__metadata__"}
    return ModelFiles(
        parameters=sum(tensors.values()) if tensors else None,
        file_bytes=sum(file.stat().st_size for file in files) if files else None,
        tensors=tensors or None,
        vocab_size=_true_vocab(directory) or config.get("vocab_size"),
        hidden_size=config.get("hidden_size") or config.get("n_embd"),
    )


def _true_vocab(directory: Path) -> int | None:
    tokenizer = _json(directory / "tokenizer.json")
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [added["id"] for added in tokenizer.get("added_tokens", [])]
    return max(ids) + 1 if ids else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def student_parameters(student: StudentSection, teacher: ModelFiles) -> tuple[int | None, int | None]:
    """(all, trained) parameters of the student."""
    tensors = teacher.tensors if student.init == "teacher_layers" else read_model(student.model).tensors
    if tensors is None:
        return None, None
    kept: dict[str, int] = {}
    for name, elements in tensors.items():
        layer = _LAYER.search(name)
        copies = student.layers.count(int(layer.group(1))) if layer and student.layers is not None else 1
        kept[name] = elements * copies
    frozen = sum(n for name, n in kept.items() if any(re.search(pattern, name) for pattern in student.freeze))
    return sum(kept.values()), sum(kept.values()) - frozen


def teacher_memory(files: ModelFiles, ranks: int, item_bytes: int) -> dict[str, int | None]:
    """Bytes a teacher rank keeps, and what the rank that maps the whole checkpoint needs of host memory on top."""
    if files.parameters is None or files.largest_gathered is None:
        return {"weights per rank": None, "gathered at a time": None, "host memory of rank 0 while loading": None}
    return {
        "weights per rank": files.parameters * item_bytes // ranks,
        "gathered at a time": files.largest_gathered * item_bytes if ranks > 1 else 0,
        "host memory of rank 0 while loading": files.file_bytes,
    }


def student_memory(
    parameters: int, trained: int, stage: int, data_ranks: int, item_bytes: int
) -> dict[str, int | None]:
    """Bytes of model states per rank (Rajbhandari et al. 2020, ZeRO, section 3), activations not counted."""
    # ZeRO keeps a float32 master copy beside the model's weights; plain float32 training does not need one.
    master = 4 if stage or item_bytes == 2 else 0
    weights, gradients, optimizer = parameters * item_bytes, trained * item_bytes, trained * (8 + master)
    return {
        "weights per rank": weights // (data_ranks if stage == 3 else 1),
        "gradients per rank": gradients // (data_ranks if stage >= 2 else 1),
        "optimizer per rank": optimizer // (data_ranks if stage >= 1 else 1),
    }


def item_bytes(dtype: Dtype, gpus_per_rank: int) -> int:
    if dtype == "auto":
        return 2 if gpus_per_rank or cpu_has_bfloat16() else 4
    return 2 if dtype == "bfloat16" else 4


def show(config: RunConfig, console: Console) -> None:
    """Print everything about ``config`` that can be known without starting it. Raises: ConfigError."""
    check_support(config.targets.payload, config.loss.divergence)
    teacher = read_model(config.teacher.model)
    console.print("[bold]config[/bold]")
    console.print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), markup=False, highlight=False)
    console.print(_layout(config), _batches(config), _memory(config, teacher), _stream(config, teacher))


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    return table


def _layout(config: RunConfig) -> Table:
    table = _table("ranks")
    teacher, student = config.teacher, config.student
    parallel = student.parallel
    ranks = parallel.pipeline * parallel.data
    sharding = f"ZeRO-3 over {teacher.ranks} ranks" if teacher.ranks > 1 else "one rank, not sharded"
    table.add_row("teacher", f"{sharding}; {teacher.cpus_per_rank} CPU, {teacher.gpus_per_rank} GPU each")
    table.add_row(
        "student",
        f"{parallel.pipeline} pipeline x {parallel.data} data = {ranks} ranks, ZeRO-{config.zero_stage};"
        f" {student.cpus_per_rank} CPU, {student.gpus_per_rank} GPU each",
    )
    cpus = teacher.ranks * teacher.cpus_per_rank + ranks * student.cpus_per_rank
    table.add_row("in all", f"{cpus} CPU, {teacher.ranks * teacher.gpus_per_rank + ranks * student.gpus_per_rank} GPU")
    return table


def _batches(config: RunConfig) -> Table:
    table, cut, train = _table("batches"), batch_cut(config), config.train
    table.add_row("rows per step", f"{cut.micro_rows} x {cut.micro_steps} micro-steps x {cut.data} ranks = {cut.rows}")
    table.add_row("tokens per step", f"at most {cut.rows * config.data.row_tokens:,}")
    table.add_row(
        "tokens in all", f"at most {cut.rows * config.data.row_tokens * train.steps:,} in {train.steps} steps"
    )
    return table


def _memory(config: RunConfig, files: ModelFiles) -> Table:
    table = _table("estimated memory (activations not counted)")
    teacher, student = config.teacher, config.student
    for name, size in teacher_memory(files, teacher.ranks, item_bytes(teacher.dtype, teacher.gpus_per_rank)).items():
        table.add_row(f"teacher: {name}", _size(size))
    parameters, trained = student_parameters(student, files)
    table.add_row("teacher: parameters", _count(files.parameters))
    table.add_row("student: parameters", f"{_count(parameters)}, {_count(trained)} of them trained")
    if parameters is None or trained is None:
        table.add_row("student: model states per rank", UNKNOWN)
        return table
    width = item_bytes(student.dtype, student.gpus_per_rank)
    for name, size in student_memory(parameters, trained, config.zero_stage, student.parallel.data, width).items():
        table.add_row(f"student: {name}", _size(size))
    return table


def _stream(config: RunConfig, teacher: ModelFiles) -> Table:
    table = _table("stream")
    if config.loss.hard_weight == 1:
        table.add_row("payload", "none: loss.hard_weight = 1 trains on labels only")
        return table
    if teacher.vocab_size is None:
        table.add_row("bytes per token", UNKNOWN)
        return table
    size = topk_bytes(config.targets.k, teacher.vocab_size)
    per_step = size * config.train.batch_rows * config.data.row_tokens
    in_flight = size * config.train.micro_rows * config.data.row_tokens * config.stream.in_flight
    table.add_row("payload", f"top-{config.targets.k} + tail, {size} bytes a token")
    table.add_row("a step", f"at most {_size(per_step)}")
    table.add_row("in flight, per student rank", f"at most {_size(in_flight)}")
    rate = _size(size * _REFERENCE_TOKENS_PER_SECOND)
    table.add_row(f"at {_REFERENCE_TOKENS_PER_SECOND:,} tokens/s", f"{rate}/s")
    return table


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
