"""What must be known before anything starts: models found, tokenizers agreed, corpus tokenized, identities."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from kdscale import identity as identities
from kdscale.config.schema import RunConfig
from kdscale.config.teachers import ALONE
from kdscale.data.images import Pixels
from kdscale.data.pairs import TokenizerPair
from kdscale.data.reading import AnyReader, RunCorpus, load_reader, read_corpus
from kdscale.data.tokenizer import Tokenizer, load_tokenizer, require_exportable
from kdscale.data.trial import require_sound
from kdscale.engine.checkpoint import Checkpoint
from kdscale.engine.cuttable import require_pipeline_family
from kdscale.engine.described import (
    class_names,
    classifier_config,
    num_classes,
    require_family,
    require_layers,
    student_config,
    student_pixels,
    width_of,
)
from kdscale.engine.directories import load_config, model_digest, resolve_model
from kdscale.engine.fragments import Index
from kdscale.engine.settings import check_settings, student_dtype
from kdscale.errors import CheckpointError, IdentityError, ModelError
from kdscale.stream.protocol import Known, Meaning


@dataclass(frozen=True)
class Prepared:
    """A run's inputs, found and checked."""

    teachers: dict[str, Known]
    """By name, the main one first."""
    reader: AnyReader
    classes: tuple[str, ...] = ()
    """Names of a classifier's classes."""

    @property
    def teacher_directory(self) -> Path:
        """Of the main teacher."""
        return Path(next(iter(self.teachers.values())).directory)

    @property
    def meaning(self) -> Meaning:
        """Of the main teacher."""
        return next(iter(self.teachers.values())).meaning


def prepare(config: RunConfig) -> Prepared:
    """Find the models and make sure that teacher and student read text alike, or tell the same classes apart.

    Raises:
        ModelError: a model is missing or of an unknown kind.
        IdentityError: another tokenizer than the teacher's, or classes in another order.
    """
    check_settings(config)
    directories = {name: resolve_model(teacher.model) for name, teacher in config.named_teachers.items()}
    directory = next(iter(directories.values()))
    if config.task != "language-modelling":
        return _prepare_classifier(config, directory)
    require_sound(str(directory))
    teacher_tokenizer = load_tokenizer(str(directory))
    _require_same_tokenizer(config, teacher_tokenizer)
    if config.student.parallel.pipeline > 1:
        require_pipeline_family(config.student, directory)
    if config.loss.layers is not None:
        require_layers(config.loss.layers, config.student, directory)
    reading = {f"teacher ({one})": load_config(one).get_text_config() for one in directories.values()}
    reading["student"] = student_config(config.student, directory).get_text_config()
    for name, model in reading.items():
        _require_positions(config, name, model)
    teachers = {name: Known(str(one.absolute()), _meaning(one, teacher_tokenizer)) for name, one in directories.items()}
    return Prepared(teachers, _reader(config, directory, teacher_tokenizer))


def _meaning(directory: Path, tokenizer: Tokenizer) -> Meaning:
    """Raises: ModelError."""
    text = load_config(directory).get_text_config()
    if text.vocab_size < tokenizer.vocab_size:
        raise ModelError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model only {text.vocab_size};"
            " they don't belong together"
        )
    return Meaning(
        teacher=model_digest(directory),
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        hidden_size=text.hidden_size,
    )


def _prepare_classifier(config: RunConfig, directory: Path) -> Prepared:
    teacher = load_config(directory)
    require_family(config.task, teacher, f"teacher.model = {config.teacher.model}")
    student = classifier_config(config.student, directory, config.task)
    reader = load_reader(config.task, config.data, config.alignment, directory)
    assert not isinstance(reader, TokenizerPair)
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
        vocab_size=num_classes(teacher),
        hidden_size=width_of(teacher),
        task=config.task,
        input_size=input_size,
    )
    known = Known(str(directory.absolute()), meaning)
    return Prepared({ALONE: known}, reader, class_names(teacher))


def _require_room(config: RunConfig, models: dict[str, PretrainedConfig], num_ids: int) -> None:
    """Raises: ModelError for a model that cannot take every id, or rows as long as the run's."""
    for name, model in models.items():
        if model.vocab_size < num_ids:
            raise ModelError(
                f"the tokenizer has {num_ids} ids, the {name} only {model.vocab_size}; they don't belong together"
            )
        _require_positions(config, name, model)


def _require_positions(config: RunConfig, name: str, model: PretrainedConfig) -> None:
    """Raises: ModelError for a model that cannot take rows as long as the run's. Some would train on beyond their positions
    without a word."""
    most = getattr(model, "max_position_embeddings", None) or config.data.row_tokens
    if most < config.data.row_tokens:
        raise ModelError(
            f"data.row_tokens = {config.data.row_tokens}: the {name} reads texts of {most} tokens at most; lower it"
        )


def _reader(config: RunConfig, directory: Path, teacher: Tokenizer) -> AnyReader:
    """``data.tokenizer`` or the teacher's, with the student's where that has its own. Raises: ModelError, IdentityError."""
    if config.alignment.method is None:
        # It agrees with the teacher's on ids, and may have another end token or chat template.
        return teacher if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)
    path = config.alignment.tokenizer
    assert path is not None
    require_sound(path)
    pair = load_reader(config.task, config.data, config.alignment, directory)
    assert isinstance(pair, TokenizerPair)
    require_exportable(pair.student, f"alignment.tokenizer = {path}")
    # Raises where the two have no token in common.
    _ = pair.matches
    if (model := _model_with_tokenizer(config)) is not None:
        # An exported student keeps a SentencePiece model as it was.
        files = [str(model / "tokenizer.model")] if (model / "tokenizer.model").is_file() else []
        found = [load_tokenizer(one).fingerprint for one in [str(model), *files]]
        if pair.student.fingerprint not in found:
            raise IdentityError(
                f"student.model = {model} has tokenizer {found[-1][:16]}, alignment.tokenizer = {path} has"
                f" {pair.student.fingerprint[:16]}; set alignment.tokenizer to the student's directory"
            )
    return pair


def _model_with_tokenizer(config: RunConfig) -> Path | None:
    """The student's directory, where it holds a tokenizer."""
    if config.student.init != "model" or config.student.model is None:
        return None
    student = resolve_model(config.student.model)
    named = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return student if any((student / name).is_file() for name in named) else None


def _require_same_tokenizer(config: RunConfig, teacher: Tokenizer) -> None:
    others = {"data.tokenizer": config.data.tokenizer}
    if config.alignment.method is None and (student := _model_with_tokenizer(config)) is not None:
        others["student.model"] = str(student)
    others |= {
        f"teachers.others.{name}.model": str(resolve_model(one.model)) for name, one in config.teachers.others.items()
    }
    for name, path in others.items():
        if path is None:
            continue
        require_sound(path)
        other = load_tokenizer(path)
        if other.fingerprint != teacher.fingerprint:
            raise IdentityError(
                f"{name} = {path} has tokenizer {other.fingerprint[:16]}, teacher.model = {config.teacher.model} has"
                f" {teacher.fingerprint[:16]}: soft targets are about token ids, both must read text with one tokenizer"
                " (alignment.tokenizer gives the student one of its own)"
            )


def corpus_of(config: RunConfig, prepared: Prepared, progress: Callable[[int, int | None, str], None]) -> RunCorpus:
    """The corpus as models read it, from the cache where it was made before. Raises: DataError."""
    return read_corpus(config.task, config.data, prepared.reader, prepared.classes, progress, config.routing)


def run_identity(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint belongs to, by dotted name (``kdscale.identity`` says what may differ); the corpus, which takes
    longer to know, is added by its fingerprint."""
    identity = identities.settings(config) | {
        "teacher": prepared.meaning.teacher,
        "tokenizer": prepared.meaning.tokenizer,
    }
    identity |= {f"teachers.others.{name}": prepared.teachers[name].meaning.teacher for name in config.teachers.others}
    if isinstance(prepared.reader, TokenizerPair):
        identity["student_tokenizer"] = prepared.reader.student.fingerprint
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
    Index(checkpoint.directory)
    then = {name: value for name, value in checkpoint.identity.items() if name in identity or name != "corpus"}
    if (dtype := student_dtype(config)) != "auto":
        then, identity = then | {"student.dtype": checkpoint.notes["dtype"]}, identity | {"student.dtype": dtype}
    identities.require_resumable(
        str(checkpoint.directory),
        identities.changes(then, identity),
        deterministic=config.run.deterministic,
        allowed=allowed,
    )
