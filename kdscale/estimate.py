"""How much memory a run needs, from config.json, tokenizers and safetensors headers alone. No torch."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdscale.config.alignment import AlignmentSection
from kdscale.config.hardware import cpu_has_bfloat16
from kdscale.config.schema import RunConfig
from kdscale.config.sections import Dtype, StudentSection, TeacherSection
from kdscale.engine.settings import GATHERED_AT_ONCE, student_dtype, topology_of
from kdscale.errors import ModelError
from kdscale.stream.whole import needs_no_teacher

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class ModelFiles:
    """What a local model directory says of itself; ``None`` where it does not."""

    parameters: int | None = None
    file_bytes: int | None = None
    shapes: dict[str, list[int]] | None = None
    """By tensor name."""
    vocab_size: int | None = None
    """Of the tokenizer."""
    embedding_rows: int | None = None
    """The same, and what pads it."""
    hidden_size: int | None = None
    num_classes: int | None = None
    """Of a classifier."""

    @property
    def tensors(self) -> dict[str, int] | None:
        """Elements by tensor name."""
        return None if self.shapes is None else {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def largest_gathered(self) -> int | None:
        """Elements that ZeRO-3 holds whole at a time: the largest embedding or layer, or twice a layer that comes at once (see
        ``settings.GATHERED_AT_ONCE``)."""
        if not self.tensors:
            return None
        groups: dict[str, int] = {}
        for name, elements in self.tensors.items():
            layer = _LAYER.search(name)
            key = f"layer {layer.group(1)}" if layer else name
            groups[key] = groups.get(key, 0) + elements
        twice = [2 * size for key, size in groups.items() if key.startswith("layer ") and size <= GATHERED_AT_ONCE]
        return max([*groups.values(), *twice])


def read_model(name: str | None) -> ModelFiles:
    """Facts of a local directory; nothing for hub names and missing directories.

    Raises: ModelError for a file that is no safetensors file.
    """
    directory = Path(name) if name else None
    if directory is None or not directory.is_dir():
        return ModelFiles()
    config = _json(directory / "config.json")
    config = config.get("text_config", config)
    shapes: dict[str, list[int]] = {}
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if 8 + size > file.stat().st_size:
                raise ModelError(
                    f"{file} is no safetensors file: its header would end behind its end; it may be a Git-LFS pointer: git lfs"
                    " pull"
                )
            header = json.loads(stream.read(size))
        shapes |= {key: one["shape"] for key, one in header.items() if key != "__metadata__"}
    return ModelFiles(
        parameters=sum(map(math.prod, shapes.values())) if shapes else None,
        file_bytes=sum(file.stat().st_size for file in files) if files else None,
        shapes=shapes or None,
        vocab_size=_true_vocab(directory) or config.get("vocab_size"),
        embedding_rows=config.get("vocab_size"),
        hidden_size=config.get("hidden_size") or config.get("n_embd") or config.get("dim"),
        # transformers leaves two classes unsaid.
        num_classes=len(config.get("id2label", "01")) if config else None,
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


def student_parameters(
    student: StudentSection, teacher: ModelFiles, alignment: AlignmentSection
) -> tuple[int | None, int | None]:
    """(all, trained) parameters of the student. Raises: ModelError for weights or an own tokenizer that cannot be read."""
    shapes = teacher.shapes if student.init == "teacher_layers" else read_model(student.model).shapes
    if student.init == "teacher_layers" and alignment.tokenizer is not None:
        shapes = _respelled(teacher, alignment.tokenizer)
    if shapes is None:
        return None, None
    kept: dict[str, int] = {}
    adapters = 0
    for name, shape in shapes.items():
        layer = _LAYER.search(name)
        copies = student.layers.count(int(layer.group(1))) if layer and student.layers is not None else 1
        kept[name] = math.prod(shape) * copies
        if student.lora is not None and len(shape) == 2 and _finds(student.lora.targets, name.removesuffix(".weight")):
            adapters += student.lora.rank * sum(shape) * copies
    frozen = sum(n for name, n in kept.items() if _finds(student.freeze, name))
    if student.lora is not None:
        frozen = sum(
            n for name, n in kept.items() if not _finds(student.lora.whole, name) or _finds(student.freeze, name)
        )
    parameters = sum(kept.values())
    return parameters + adapters, parameters - frozen + adapters


def _respelled(files: ModelFiles, tokenizer: str) -> dict[str, list[int]] | None:
    """Shapes of the model with a row of embedding and head for each token of another ``tokenizer``, a local one."""
    rows = files.embedding_rows
    if files.shapes is None or rows is None or not Path(tokenizer).exists():
        return None
    # Its libraries take longer to import than all else here.
    from kdscale.data.tokenizer import load_tokenizer

    own = load_tokenizer(tokenizer).vocab_size
    return {
        name: [own, *shape[1:]] if shape[:1] == [rows] and not _LAYER.search(name) else shape
        for name, shape in files.shapes.items()
    }


def _finds(patterns: list[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


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


def pending_checkpoint(parameters: int, trained: int, item_bytes: int, *, pipeline: bool) -> int:
    """Bytes of host memory that a checkpoint takes over all ranks until it is written: a copy of weights and optimizer. Only
    the stages of a pipeline save frozen weights."""
    return (parameters if pipeline else trained) * item_bytes + trained * 12


def item_bytes(dtype: Dtype, gpus_per_rank: int) -> int:
    if dtype == "auto":
        return 2 if gpus_per_rank or cpu_has_bfloat16() else 4
    return 2 if dtype == "bfloat16" else 4


def cores_and_gpus(config: RunConfig) -> tuple[int, int]:
    """CPU cores (threads of ranks) and GPUs that a run asks for: of its student, of all replicas of the teachers it starts, and
    of who writes the student's text."""
    teachers = () if needs_no_teacher(config.targets) else config.named_teachers.values()
    asked = [(one.replicas * one.ranks, one.cpus_per_rank, one.gpus_per_rank) for one in teachers]
    student, writers = config.student, config.on_policy
    asked.append((topology_of(student.parallel).world, student.cpus_per_rank, student.gpus_per_rank))
    if writers is not None:
        asked.append((writers.ranks, writers.cpus_per_rank, writers.gpus_per_rank))
    return sum(ranks * cpus for ranks, cpus, _ in asked), sum(ranks * gpus for ranks, _, gpus in asked)


def host_memory(
    config: RunConfig, teachers: Iterable[TeacherSection], *, student: bool, rollouts: bool = False
) -> int | None:
    """Bytes of host memory that the ranks on CPUs which are started need together for weights and model states, those of
    ``teachers`` among them; ``None``: unknown. Ranks with GPUs are not counted.

    A teacher's weights are counted once a replica, over its ranks, with the file that rank 0 maps while loading.
    """
    files = read_model(config.teacher.model)
    parameters, trained = student_parameters(config.student, files, config.alignment)
    if files.parameters is None or files.file_bytes is None or parameters is None or trained is None:
        return None
    needed = 0
    for one in teachers:
        if one.gpus_per_rank:
            continue
        theirs = read_model(one.model)
        if theirs.parameters is None or theirs.file_bytes is None:
            return None
        needed += one.replicas * theirs.parameters * item_bytes(one.dtype, 0) + theirs.file_bytes
    parallel, width = config.student.parallel, item_bytes(student_dtype(config), 0)
    if rollouts and config.on_policy is not None and not config.on_policy.gpus_per_rank:
        needed += config.on_policy.ranks * parameters * width
    if not student or config.student.gpus_per_rank:
        return needed
    # The stages of a pipeline hold one model between them, but each rank builds the whole one first.
    states = student_memory(parameters, trained, config.zero_stage, parallel.data, width)
    building = parallel.pipeline * parallel.data * parameters * width
    training = parallel.data * sum(size or 0 for size in states.values())
    return needed + max(
        building, training + pending_checkpoint(parameters, trained, width, pipeline=parallel.pipeline > 1)
    )
