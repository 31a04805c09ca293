"""What must be known before anything starts: models found, tokenizers agreed, corpus tokenized, identities."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdscale.config.schema import RunConfig
from kdscale.data.corpus import Corpus, build_corpus
from kdscale.data.tokenizer import Tokenizer, load_tokenizer
from kdscale.engine.families import require_pipeline_family
from kdscale.engine.models import load_config, model_digest, resolve_model
from kdscale.engine.settings import check_settings
from kdscale.errors import IdentityError, ModelError
from kdscale.stream.protocol import Meaning


@dataclass(frozen=True)
class Prepared:
    """A run's inputs, found and checked."""

    teacher_directory: Path
    tokenizer: Tokenizer
    meaning: Meaning


def prepare(config: RunConfig) -> Prepared:
    """Find the models and make sure that teacher and student read text alike.

    Raises:
        ModelError: a model is missing or of an unknown kind.
        IdentityError: another tokenizer than the teacher's.
    """
    check_settings(config)
    directory = resolve_model(config.teacher.model)
    teacher_tokenizer = load_tokenizer(str(directory))
    _require_same_tokenizer(config, teacher_tokenizer)
    if config.student.parallel.pipeline > 1:
        require_pipeline_family(config.student, directory)
    text = load_config(directory).get_text_config()
    if text.vocab_size < teacher_tokenizer.vocab_size:
        raise ModelError(
            f"{directory}: the tokenizer has {teacher_tokenizer.vocab_size} ids, the model only {text.vocab_size};"
            " they don't belong together"
        )
    meaning = Meaning(
        teacher=model_digest(directory),
        tokenizer=teacher_tokenizer.fingerprint,
        vocab_size=teacher_tokenizer.vocab_size,
        hidden_size=text.hidden_size,
    )
    return Prepared(directory, teacher_tokenizer, meaning)


def _require_same_tokenizer(config: RunConfig, teacher: Tokenizer) -> None:
    others = {"data.tokenizer": config.data.tokenizer}
    if config.student.init == "model" and config.student.model is not None:
        student = resolve_model(config.student.model)
        if any((student / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            others["student.model"] = str(student)
    for name, path in others.items():
        if path is None:
            continue
        other = load_tokenizer(path)
        if other.fingerprint != teacher.fingerprint:
            raise IdentityError(
                f"{name} = {path} has tokenizer {other.fingerprint[:16]}, teacher.model = {config.teacher.model} has"
                f" {teacher.fingerprint[:16]}: soft targets are about token ids, both must read text with one tokenizer"
            )


def corpus_of(config: RunConfig, prepared: Prepared, progress: Callable[[int, int | None, str], None]) -> Corpus:
    """The tokenized corpus, from the cache where it was made before. Raises: DataError."""
    return build_corpus(config.data, prepared.tokenizer, progress)


def run_identity(config: RunConfig, prepared: Prepared, corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint belongs to. Settings that change no number (threads, limits, the cut into micro-batches) are
    left out."""
    student = config.student.model_dump(include={"init", "layers", "model", "config", "freeze"})
    return {
        "teacher": prepared.meaning.teacher,
        "tokenizer": prepared.meaning.tokenizer,
        "corpus": corpus.fingerprint,
        "rows": f"{config.data.packing} {config.data.row_tokens}",
        "seed": config.run.seed,
        "student": student,
        "targets": config.targets.model_dump(),
        "loss": config.loss.model_dump(exclude={"chunk_mib"}),
        "train": config.train.model_dump(mode="json", exclude={"micro_rows"}),
        "ranks": config.student.parallel.model_dump(),
        "zero_stage": config.zero_stage,
    }
