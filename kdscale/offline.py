"""What needs neither cluster nor teacher: a checkpoint's student as a Hugging Face model directory."""

from pathlib import Path

import torch

from kdscale.config.schema import RunConfig
from kdscale.data.pairs import TokenizerPair
from kdscale.data.reading import load_reader
from kdscale.engine import process
from kdscale.engine.checkpoint import verify
from kdscale.engine.described import student_pixels
from kdscale.engine.directories import resolve_model
from kdscale.engine.export import load_checkpoint_weights, require_replaceable, write_model
from kdscale.engine.models import build_student
from kdscale.errors import CheckpointError
from kdscale.mirror import find


def export_checkpoint(config: RunConfig, checkpoint: str, out: Path | None) -> Path:
    """Write the student of ``checkpoint`` (``auto``: the newest of the run) and return its directory.

    The weights are written in the dtype they were trained in.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of another student.
        ConfigError: ``out`` is something else than an earlier export.
    """
    run = Path(config.run.dir) / config.run.name
    own = run / "student"
    written = out or own
    # What a run has exported is its own to replace.
    if written.resolve() != own.resolve():
        require_replaceable(written, "hf")
    found = find(config, "auto") if checkpoint == "auto" else verify(Path(checkpoint))
    if found is None:
        raise CheckpointError(f"{run / 'checkpoints'} holds no checkpoint; train first, or name one with --checkpoint")
    directory = resolve_model(config.teacher.model)
    dtype = getattr(torch, found.notes.get("dtype", "float32"))
    reader = load_reader(config.task, config.data, config.alignment, directory)
    pair = reader if isinstance(reader, TokenizerPair) else None
    # Fresh weights that stayed as they were are in no checkpoint but by their digests.
    process.set_seed(config.run.seed)
    model = build_student(config.student, directory, dtype, config.task, pair)
    load_checkpoint_weights(model, found)
    save = (student_pixels(config.student, directory, config.task) or reader).save
    write_model(model, dict(model.state_dict()), written, save, config.export.shard_bytes)
    return written
