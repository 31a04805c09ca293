"""What must be known before anything starts: models found, tokenizers agreed, corpus tokenized, identities."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from kdscale import identity as identities
from kdscale.config.schema import RunConfig
from kdscale.data.examples import Reader
from kdscale.data.images import Pixels
from kdscale.data.reading import RunCorpus, load_reader, read_corpus
from kdscale.data.tokenizer import Tokenizer, load_tokenizer
from kdscale.data.trial import require_sound
from kdscale.engine import classifiers
from kdscale.engine.checkpoint import Checkpoint
from kdscale.engine.directories import load_config, model_digest, resolve_model
from kdscale.engine.families import require_pipeline_family
from kdscale.engine.layers import require_layers
from kdscale.engine.models import classifier_config, student_pixels
from kdscale.engine.settings import check_settings, student_dtype
from kdscale.engine.shards import Shards
from kdscale.errors import CheckpointError, IdentityError, ModelError
from kdscale.stream.protocol import Meaning


@dataclass(frozen=True)
class Prepared:
    """A run's inputs, found and checked."""

    teacher_directory: Path
    reader: Reader
    meaning: Meaning
    classes: tuple[str, ...] = ()
    """Names of a classifier's classes."""


def prepare(config: RunConfig) -> Prepared:
    """Find the models and make sure that teacher and student read text alike, or tell the same classes apart.

    Raises:
        ModelError: a model is missing or of an unknown kind.
        IdentityError: another tokenizer than the teacher's, or classes in another order.
    """
    check_settings(config)
    directory = resolve_model(config.teacher.model)
    if config.task != "language-modelling":
        return _prepare_classifier(config, directory)
    require_sound(str(directory))
    teacher_tokenizer = load_tokenizer(str(directory))
    _require_same_tokenizer(config, teacher_tokenizer)
    if config.student.parallel.pipeline > 1:
        require_pipeline_family(config.student, directory)
    if config.loss.layers is not None:
        require_layers(config.loss.layers, config.student, directory)
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


def _prepare_classifier(config: RunConfig, directory: Path) -> Prepared:
    teacher = load_config(directory)
    classifiers.require_family(config.task, teacher, f"teacher.model = {config.teacher.model}")
    student = classifier_config(config.student, directory, config.task)
    reader = load_reader(config.task, config.data, directory)
    if isinstance(reader, Pixels):
        student_pixels(config.student, directory, config.task)
        input_size = reader.size
    else:
        _require_same_tokenizer(config, load_tokenizer(str(directory)))
        input_size = reader.vocab_size
        _require_room(config, {"teacher": teacher, "student": student}, input_size)
    meaning = Meaning(
        teacher=model_digest(directory),
        tokenizer=reader.fingerprint,
        vocab_size=classifiers.num_classes(teacher),
        hidden_size=classifiers.head_width(teacher),
        task=config.task,
        input_size=input_size,
    )
    return Prepared(directory, reader, meaning, classifiers.class_names(teacher))


def _require_room(config: RunConfig, models: dict[str, PretrainedConfig], num_ids: int) -> None:
    """Raises: ModelError for a model that cannot take every id, or rows as long as the run's."""
    for name, model in models.items():
        if model.vocab_size < num_ids:
            raise ModelError(
                f"the tokenizer has {num_ids} ids, the {name} only {model.vocab_size}; they don't belong together"
            )
        most = getattr(model, "max_position_embeddings", config.data.row_tokens)
        if most < config.data.row_tokens:
            raise ModelError(
                f"data.row_tokens = {config.data.row_tokens}: the {name} reads texts of {most} tokens at most; lower it"
            )


def _require_same_tokenizer(config: RunConfig, teacher: Tokenizer) -> None:
    others = {"data.tokenizer": config.data.tokenizer}
    if config.student.init == "model" and config.student.model is not None:
        student = resolve_model(config.student.model)
        if any((student / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            others["student.model"] = str(student)
    for name, path in others.items():
        if path is None:
            continue
        require_sound(path)
        other = load_tokenizer(path)
        if other.fingerprint != teacher.fingerprint:
            raise IdentityError(
                f"{name} = {path} has tokenizer {other.fingerprint[:16]}, teacher.model = {config.teacher.model} has"
                f" {teacher.fingerprint[:16]}: soft targets are about token ids, both must read text with one tokenizer"
            )


def corpus_of(config: RunConfig, prepared: Prepared, progress: Callable[[int, int | None, str], None]) -> RunCorpus:
    """The corpus as models read it, from the cache where it was made before. Raises: DataError."""
    return read_corpus(config.task, config.data, prepared.reader, prepared.classes, progress)


def run_identity(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint belongs to, by dotted name (``kdscale.identity`` says what may differ); the corpus, which takes
    longer to know, is added by its fingerprint."""
    identity = identities.settings(config) | {
        "teacher": prepared.meaning.teacher,
        "tokenizer": prepared.meaning.tokenizer,
    }
    # Ranks know what `auto` stands for; what they resolved is in a checkpoint's notes.
    del identity["student.dtype"]
    if config.student.init == "model" and config.student.model is not None:
        identity["student.files"] = model_digest(resolve_model(config.student.model))
    return identity


def require_resumable(config: RunConfig, checkpoint: Checkpoint | None, identity: dict[str, Any]) -> None:
    """Whether a run of ``config`` may go on from ``checkpoint``; without a corpus in ``identity``, as far as it is known.

    Raises:
        ConfigError: ``checkpoint.allow_changed`` names what is no setting.
        CheckpointError: another run's checkpoint, one of a step behind the last, or one without an index of its shards.
    """
    allowed = config.checkpoint.allow_changed
    identities.require_known(allowed, [*identity, "corpus", *identities.names(config), *identities.ENVIRONMENT])
    if checkpoint is None:
        return
    if checkpoint.step > config.train.steps:
        raise CheckpointError(
            f"{checkpoint.directory} was written after {checkpoint.step} steps and train.steps = {config.train.steps};"
            " raise train.steps, name an earlier checkpoint with --resume, or start over with --resume never"
        )
    Shards(checkpoint.directory)
    then = {name: value for name, value in checkpoint.identity.items() if name in identity or name != "corpus"}
    if (dtype := student_dtype(config)) != "auto":
        then, identity = then | {"student.dtype": checkpoint.notes["dtype"]}, identity | {"student.dtype": dtype}
    identities.require_resumable(
        str(checkpoint.directory),
        identities.changes(then, identity),
        deterministic=config.run.deterministic,
        allowed=allowed,
    )
