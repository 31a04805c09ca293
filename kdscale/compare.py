"""A model as it was and as it was written to be deployed, side by side on held-out text."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kdscale.batch import Batch, HiddenTargets
from kdscale.config.schema import RunConfig
from kdscale.config.sections import DataSection
from kdscale.data.corpus import build_corpus
from kdscale.data.loader import Loader
from kdscale.data.tokenizer import Tokenizer, load_tokenizer
from kdscale.engine.attention import attend_by_document
from kdscale.engine.directories import resolve_model
from kdscale.engine.gguf_tokenizer import SAMPLE
from kdscale.engine.models import base_hidden, head_of
from kdscale.errors import ModelError
from kdscale.evaluate.quality import TeacherView, label_sums, quality, quality_sums
from kdscale.head import Head
from kdscale.student.module import flatten_batch

_ROW_TOKENS, _HELDOUT_TOKENS, _ROWS = 256, 4096, 2
_COMPARED = 512
"""Positions whose logits lie in memory whole, on both sides."""
_WORST_AGREEMENT = 0.8
"""What has another likeliest token more often is no rounding of the model."""
_LOSSLESS_DIFFERENCE = 1e-3
"""Of the largest logit; both sides compute in float32, from the same weights."""


@dataclass(frozen=True)
class Comparison:
    """What was written against the model it was made of, both computing in float32 what the format leaves to them."""

    num_tokens: int
    """Positions compared."""
    max_logit_difference: float
    """Of the first positions, like ``largest_logit``."""
    largest_logit: float
    kl: float
    """KL(model ‖ what was written), nats a token."""
    top1_agreement: float
    perplexity: float
    perplexity_before: float


def heldout_rows(config: RunConfig) -> list[Batch]:
    """A run's held-out text, as its student reads it. Raises: DataError."""
    own = config.alignment.tokenizer or config.data.tokenizer
    return _rows(config.data, load_tokenizer(own or str(resolve_model(config.teacher.model))))


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


def view(model: PreTrainedModel, vocab_size: int, batches: list[Batch]) -> TeacherView:
    """The model in the part of the teacher; ``vocab_size`` is its tokenizer's. Raises: ModelError: a head of fewer rows."""
    head, hidden = Head(*head_of(model, vocab_size)), _hidden(model, batches)
    targets = [HiddenTargets(torch.from_numpy(b.labels()), hidden_TD=h) for b, h in zip(batches, hidden, strict=True)]
    return TeacherView(batches, targets, head, nll=float(label_sums(hidden, head, batches)[2]), right=0)


@torch.no_grad()
def compare(model: PreTrainedModel, before: TeacherView) -> Comparison:
    """``model``, read from what was written, against the ``view`` of the one it was made of."""
    head, hidden = Head(*head_of(model, before.head.spec.vocab_size)), _hidden(model, before.batches)
    found = quality(quality_sums(hidden, head, before), classes=False)
    assert found.kl is not None
    assert found.top1_agreement is not None
    assert found.perplexity_teacher is not None
    ours_TV = head.logits(hidden[0][:_COMPARED])
    theirs_TV = before.head.logits(before.targets[0].hidden_TD[:_COMPARED])
    return Comparison(
        num_tokens=found.num_tokens,
        max_logit_difference=float((ours_TV - theirs_TV).abs().max()),
        largest_logit=float(theirs_TV.abs().max()),
        kl=found.kl,
        top1_agreement=found.top1_agreement,
        perplexity=found.perplexity_student,
        perplexity_before=found.perplexity_teacher,
    )


def require_same(found: Comparison, what: str, *, lossless: bool, way_out: str) -> None:
    """Raises: ModelError when ``what`` was written is not the model; ``lossless``: not even rounded."""
    if lossless and not found.max_logit_difference <= _LOSSLESS_DIFFERENCE * found.largest_logit:
        raise ModelError(
            f"{what}: read again, its logits differ from the model's by {found.max_logit_difference:.3g} (the largest is"
            f" {found.largest_logit:.3g}); nothing was kept"
        )
    if not found.top1_agreement >= _WORST_AGREEMENT:
        raise ModelError(
            f"{what}: its likeliest token is the model's in {found.top1_agreement:.3f} of {found.num_tokens} positions"
            f" (KL {found.kl:.3g}), and {_WORST_AGREEMENT} is the least; nothing was kept. {way_out}"
        )


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
