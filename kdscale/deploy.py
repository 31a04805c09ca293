"""A model directory as a GGUF file: written aside, loaded again, compared with the model, and only then given its name."""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from kdscale.batch import Batch, HiddenTargets
from kdscale.config.schema import RunConfig
from kdscale.config.sections import DataSection, GgufType
from kdscale.data.corpus import build_corpus
from kdscale.data.loader import Loader
from kdscale.data.tokenizer import Tokenizer, load_tokenizer
from kdscale.durable import sync_directory, sync_file, write_durably
from kdscale.engine.attention import attend_by_document
from kdscale.engine.directories import load_config, resolve_model
from kdscale.engine.gguf_file import load_gguf, own_type, require_gguf, stored_dtype, write_gguf
from kdscale.engine.gguf_tokenizer import SAMPLE, require_same_tokens
from kdscale.engine.models import base_hidden, head_of, load_causal_lm
from kdscale.errors import ConfigError, ModelError
from kdscale.evaluate.quality import TeacherView, label_sums, quality, quality_sums
from kdscale.head import Head
from kdscale.offline import export_checkpoint
from kdscale.student.module import flatten_batch

_ROW_TOKENS, _HELDOUT_TOKENS, _ROWS = 256, 4096, 2
_WORST_AGREEMENT = 0.8
"""A file whose likeliest token is another one more often is no rounding of the model."""
_LOSSLESS_DIFFERENCE = 1e-3
"""Of the largest logit; both sides compute in float32, from the same weights."""


@dataclass(frozen=True)
class GgufReport:
    """A GGUF file against the model it was made of, both computing in float32."""

    file: str
    type: str
    bytes: int
    bytes_before: int
    """Of the model directory's safetensors."""
    num_tokens: int
    """Positions compared."""
    max_logit_difference: float
    """Of the first rows, like ``largest_logit``."""
    largest_logit: float
    kl: float
    """KL(model ‖ file), nats a token."""
    top1_agreement: float
    perplexity: float
    perplexity_before: float

    def line(self) -> str:
        mib, mib_before = self.bytes / 2**20, self.bytes_before / 2**20
        return (
            f"{self.file}: {mib:.0f} MiB as {self.type} ({mib_before:.0f} before); against the model as it was, on"
            f" {self.num_tokens} tokens: KL {self.kl:.2e} nats/token, top-1 agreement {self.top1_agreement:.4f}, perplexity"
            f" {self.perplexity:.3f} ({self.perplexity_before:.3f} before)"
        )


def to_gguf(
    source: RunConfig | Path, checkpoint: str, out: Path | None, kind: GgufType | None, text: list[str] | None
) -> GgufReport:
    """The student of a run's ``checkpoint``, or a model directory, as a GGUF file (see ``export_gguf``).

    It is measured on ``text``, or else on the run's held-out text. The default place is ``student-TYPE.gguf`` in the run's
    directory, or ``MODEL-TYPE.gguf`` beside the model's.

    Raises:
        KdscaleError: what reading checkpoint, model and text, or writing the file raises.
    """
    if isinstance(source, Path):
        directory = source.absolute()
        rows = text_rows(text, directory) if text else None
        kind = kind or own_type(load_config(directory))
        return export_gguf(directory, out or directory.with_name(f"{directory.name}-{kind}.gguf"), kind, rows)
    if source.task != "language-modelling":
        raise ConfigError(
            f"task = {source.task}: a GGUF file is a language model, and has no place for a classifier's head; use --format hf"
        )
    run = Path(source.run.dir) / source.run.name
    with tempfile.TemporaryDirectory(prefix=".export-", dir=run) as scratch:
        directory = export_checkpoint(source, checkpoint, Path(scratch) / source.run.name)
        rows = text_rows(text, directory) if text else heldout_rows(source)
        kind = kind or own_type(load_config(directory))
        return export_gguf(directory, out or run / f"student-{kind}.gguf", kind, rows)


def export_gguf(directory: Path, out: Path, kind: GgufType, batches: list[Batch] | None) -> GgufReport:
    """Write the model in ``directory`` as the file ``out``, with a report of the comparison on ``batches`` beside it.

    Without ``batches`` a line of text has to do, which tells whether the file is the model, but not what rounding costs.

    Raises:
        ModelError: a family, tokenizer or setting that GGUF cannot carry; or what was written is not the model.
        ConfigError: a ``kind`` that rounds, and nothing to measure it on.
    """
    fields = load_config(directory)
    require_gguf(fields, directory)
    lossless = kind in ("f32", own_type(fields))
    if batches is None and not lossless:
        raise ConfigError(f"--type {kind} rounds the weights; name text to measure what that costs on with --text FILE")
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    vocab_size = load_tokenizer(str(directory)).vocab_size
    batches = batches or sample_rows(directory)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.stem}.partial.gguf")
    try:
        model = load_causal_lm(directory, stored_dtype(fields))
        write_gguf(model, tokenizer, staging, kind, directory.absolute().name)
        require_same_tokens(tokenizer, AutoTokenizer.from_pretrained(staging.parent, gguf_file=staging.name))
        view = _view(model.float(), vocab_size, batches)
        # Large models lie in memory one at a time.
        del model
        report = GgufReport(
            str(out),
            kind,
            staging.stat().st_size,
            sum(path.stat().st_size for path in directory.glob("*.safetensors")),
            **_against(load_gguf(staging, torch.float32), view),
        )
        _require_good(report, lossless=lossless)
        sync_file(staging)
        staging.rename(out)
        sync_directory(out.parent)
    finally:
        staging.unlink(missing_ok=True)
    write_durably(out.with_name(f"{out.name}.json"), (json.dumps(asdict(report), indent=1) + "\n").encode())
    return report


def heldout_rows(config: RunConfig) -> list[Batch]:
    """A run's held-out text. Raises: DataError."""
    return _rows(config.data, load_tokenizer(config.data.tokenizer or str(resolve_model(config.teacher.model))))


def text_rows(files: list[str], directory: Path) -> list[Batch]:
    """Rows of ``files`` (as in ``data.heldout``) for the model in ``directory``. Raises: DataError."""
    with tempfile.TemporaryDirectory(prefix="kdscale-text-") as cache:
        fields = {"train": files, "heldout": files, "row_tokens": _ROW_TOKENS, "heldout_tokens": _HELDOUT_TOKENS}
        # What a tokenizer has no end token for has none here either.
        data = DataSection.model_validate({**fields, "cache_dir": cache, "append_eos": False})
        return _rows(data, load_tokenizer(str(directory)))


def sample_rows(directory: Path) -> list[Batch]:
    """A row of ``SAMPLE``."""
    with tempfile.TemporaryDirectory(prefix="kdscale-text-") as scratch:
        file = Path(scratch) / "sample.txt"
        file.write_text(SAMPLE)
        return text_rows([str(file)], directory)


def _rows(data: DataSection, tokenizer: Tokenizer) -> list[Batch]:
    corpus = build_corpus(data, tokenizer, lambda done, total, what: None)
    loader = Loader(corpus.heldout, data.packing, data.row_tokens, 1, 0)
    return [*loader.heldout_batches(data.heldout_tokens, rows_per_batch=_ROWS)]


@torch.no_grad()
def _hidden(model: PreTrainedModel, batches: list[Batch]) -> list[torch.Tensor]:
    """Final hidden states [T, D] of each batch's trained positions."""
    attend_by_document(model.eval())
    found = []
    for batch in batches:
        ids_RL, positions_RL, trained_T = flatten_batch(batch, torch.device("cpu"))
        found.append(base_hidden(model, ids_RL, positions_RL).flatten(0, 1)[trained_T])
    return found


def _view(model: PreTrainedModel, vocab_size: int, batches: list[Batch]) -> TeacherView:
    """The model in the part of the teacher."""
    head, hidden = Head(*head_of(model, vocab_size)), _hidden(model, batches)
    targets = [HiddenTargets(torch.from_numpy(b.labels()), hidden_TD=h) for b, h in zip(batches, hidden, strict=True)]
    return TeacherView(batches, targets, head, nll=float(label_sums(hidden, head, batches)[2]), right=0)


@torch.no_grad()
def _against(model: PreTrainedModel, view: TeacherView) -> dict[str, Any]:
    """The figures of a report."""
    head, hidden = Head(*head_of(model, view.head.spec.vocab_size)), _hidden(model, view.batches)
    found = quality(quality_sums(hidden, head, view), classes=False)
    assert found.kl is not None
    assert found.top1_agreement is not None
    assert found.perplexity_teacher is not None
    ours_TV, theirs_TV = head.logits(hidden[0]), view.head.logits(view.targets[0].hidden_TD)
    return {
        "num_tokens": found.num_tokens,
        "max_logit_difference": float((ours_TV - theirs_TV).abs().max()),
        "largest_logit": float(theirs_TV.abs().max()),
        "kl": found.kl,
        "top1_agreement": found.top1_agreement,
        "perplexity": found.perplexity_student,
        "perplexity_before": found.perplexity_teacher,
    }


def _require_good(report: GgufReport, *, lossless: bool) -> None:
    if lossless and not report.max_logit_difference <= _LOSSLESS_DIFFERENCE * report.largest_logit:
        raise ModelError(
            f"{report.file}: read again, its logits differ from the model's by {report.max_logit_difference:.3g} (the largest is"
            f" {report.largest_logit:.3g}); nothing was kept"
        )
    if not report.top1_agreement >= _WORST_AGREEMENT:
        raise ModelError(
            f"{report.file}: its likeliest token is the model's in {report.top1_agreement:.3f} of {report.num_tokens} positions"
            f" (KL {report.kl:.3g}); nothing was kept. Use --type f16 or bf16"
        )
