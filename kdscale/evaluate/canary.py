"""Served == local: what the teacher serves is what a plain forward of the same files gives. Checked before step 1."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdscale.batch import PADDING_SEGMENT, Batch, DenseTargets, ExampleBatch, HiddenTargets, SoftTargets, TopkTargets
from kdscale.engine.models import load_causal_lm
from kdscale.errors import CanaryError
from kdscale.evaluate.plain import plain_logits
from kdscale.head import Head
from kdscale.spec import ENCODINGS, TargetSpec, Task
from kdscale.stream.prefetch import check_alignment
from kdscale.stream.source import TargetSource
from kdscale.targets.payloads import make_targets, targets_of_logits

# (largest, mean). float16 on the wire rounds a log-probability of -8 by 4e-3. Two bfloat16 forwards that round in other
# places differ as each does from float32: SmolLM2-135M by 0.6 at most and 0.06 on average, over 2,048 positions.
TOLERANCE = {torch.float32: (0.02, 0.004), torch.bfloat16: (1.0, 0.15)}
_HIDDEN_TOLERANCE = (0.3, 0.03)
"""Of a float32 teacher whose hidden states travel as bfloat16: SmolLM2-135M's log-probabilities are then off by 0.07 at most and
0.006 on average, over 1,024 positions."""
_ENTRIES = 64
_PROBABLE = -6.0
"""Entries likelier than e^-6 are compared, and every position's likeliest; the others are all noise in bfloat16."""
_MANY = 20
"""Of fewer positions (examples), one near tie would decide on the top-1 agreement."""


@dataclass(frozen=True)
class CanaryReport:
    """What was compared and how far apart the two were."""

    num_tokens: int
    max_logp_difference: float
    mean_logp_difference: float
    top1_agreement: float

    def line(self) -> str:
        return (
            f"ok: {self.num_tokens} positions, top-1 agreement {self.top1_agreement:.4f}, log-probabilities within"
            f" {self.max_logp_difference:.1e}, {self.mean_logp_difference:.1e} on average"
        )


def comparable(spec: TargetSpec) -> TargetSpec:
    """What to ask for in place of ``spec`` so that its log-probabilities can be compared; ``spec`` itself where it tells them.

    Samples tell none, and what travels in codes of few bits (uint8, uint4, int8) tells them more roughly than the tolerance is.
    """
    if spec.payload == "sampled":
        return TargetSpec("topk", k=_ENTRIES, temperature=spec.temperature)
    return replace(spec, encoding=ENCODINGS[spec.payload][0])


def served_topk(batch: Batch, spec: TargetSpec, source: TargetSource, head: Head | None) -> TopkTargets:
    """The served teacher's likeliest tokens on ``batch``, by what is ``comparable`` of ``spec``.

    ``head`` is the teacher's, fetched over the stream: needed for hidden states.
    """
    top = TargetSpec("topk", k=_ENTRIES, temperature=spec.temperature)
    served = source.fetch(batch, comparable(spec))
    check_alignment(batch, served)
    match served:
        case HiddenTargets():
            assert head is not None
            return _topk(make_targets(served.hidden_TD, head, served.labels_T, top))
        case DenseTargets():
            # Normalised already, whatever the temperature.
            plain = TargetSpec("topk", k=_ENTRIES)
            found = _topk(targets_of_logits(served.logp_TV.clone(), served.labels_T, plain))
            return replace(found, temperature=served.temperature)
        case _:
            return _topk(served)


def _topk(targets: SoftTargets) -> TopkTargets:
    assert isinstance(targets, TopkTargets)
    return targets


def run_canary(
    batch: Batch,
    served: TopkTargets,
    directory: Path,
    vocab_size: int,
    dtype: torch.dtype,
    task: Task,
    *,
    of_hidden: bool = False,
) -> CanaryReport:
    """Compare served targets of ``batch`` with transformers' own forward, one document or example at a time. ``of_hidden``:
    they came as hidden states.

    Raises:
        CanaryError: they differ; training on such targets would silently teach something else.
    """
    plain_TV = plain_logp(batch, directory, vocab_size, dtype, served.temperature, task)
    tolerance = _HIDDEN_TOLERANCE if of_hidden and dtype == torch.float32 else TOLERANCE[dtype]
    return compare(served, plain_TV, tolerance)


@torch.no_grad()
def plain_logp(
    batch: Batch, directory: Path, vocab_size: int, dtype: torch.dtype, temperature: float, task: Task
) -> torch.Tensor:
    """Log-probabilities [T, V] of a plain, unsharded model that reads each packed document alone.

    Phantom rows of a padded embedding are left out, as they are by the served teacher.
    """
    if isinstance(batch, ExampleBatch):
        logits_TV = plain_logits(batch, directory, vocab_size, dtype, task, torch.device("cpu"))
        return torch.log_softmax(logits_TV / temperature, dim=-1)
    model = load_causal_lm(directory, dtype).eval()
    rows = []
    for row in range(batch.num_rows):
        for segment in sorted(set(batch.segments_RL[row].tolist()) - {PADDING_SEGMENT}):
            here = batch.segments_RL[row] == segment
            logits = model(input_ids=torch.from_numpy(batch.ids_RL[row][here]).long().unsqueeze(0)).logits[0].float()
            trained = torch.from_numpy(batch.predicts_RL[row][here])
            rows.append(logits[trained, :vocab_size] / temperature)
    return torch.log_softmax(torch.cat(rows), dim=-1)


def compare(served: TopkTargets, plain_TV: torch.Tensor, tolerance: tuple[float, float]) -> CanaryReport:
    """``tolerance``: the largest and the mean difference of log-probabilities. Raises: CanaryError naming the likely cause."""
    local_TK = plain_TV.gather(1, served.ids_TK.long())
    probable = served.logp_TK > _PROBABLE
    # At a high temperature no entry is that likely.
    probable[:, 0] = True
    difference = (served.logp_TK - local_TK).abs()[probable]
    worst, mean = float(difference.max()), float(difference.mean())
    most, most_mean = tolerance
    agreement = float((plain_TV.argmax(-1) == served.ids_TK[:, 0]).double().mean())
    report = CanaryReport(len(served), worst, mean, agreement)
    if not (worst <= most and mean <= most_mean) or (agreement < 0.9 and len(served) >= _MANY):
        raise CanaryError(
            f"the served teacher differs from a plain forward of the same files: log-probabilities by up to {worst:.3g}"
            f" (allowed {most:g}), {mean:.3g} on average (allowed {most_mean:g}), top-1 agreement {agreement:.3f}. Likely causes:"
            " a shift by one or packed documents that see each other (agreement near 0),"
            " a padded vocabulary or another temperature (agreement near 1), another dtype (teacher.dtype)"
        )
    return report
