"""What a payload loses: bytes against errors of the distribution and of the student's gradient, on real positions.

T = positions, V = true vocabulary, D = hidden size. Pure functions over hidden states; everything goes through the very code
that serves and trains: make_targets -> Arrow -> fused loss.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from kdscale.batch import HiddenTargets, SampledTargets, SoftTargets
from kdscale.head import Head, chunk_rows
from kdscale.losses.blocks import STATS, block_gradient
from kdscale.losses.divergence import Divergence
from kdscale.losses.fused import fused_loss
from kdscale.losses.objective import Objective
from kdscale.spec import TargetSpec
from kdscale.targets import arrow
from kdscale.targets.decode import decode
from kdscale.targets.encode import encode
from kdscale.targets.layout import schema, schema_bytes
from kdscale.targets.payloads import make_targets

_CHUNK_BYTES = 64 << 20
_FORWARD = Divergence("forward_kl")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Positions:
    """Both models' view of the same T positions."""

    labels_T: torch.Tensor
    teacher_TD: torch.Tensor
    teacher_head: Head
    student_TD: torch.Tensor
    student_head: Head


@dataclass(frozen=True)
class Fidelity:
    """One payload setting, measured."""

    spec: TargetSpec
    bytes_per_token: int
    kl: float
    """Mean KL(p ‖ p_hat), nats: p_hat is the distribution that the student's forward-KL gradient pulls towards, so a tail
    counts as spread the way the student spreads it. Infinite where p_hat rules out possible tokens (samples)."""
    noise: float
    """Mean of the sum over V of (p_hat - p)^2: the noise of the gradient with respect to the logits."""
    angle_degrees: float
    """Between the gradient with respect to the student's hidden states and the exact one, all positions as one vector."""
    norm_error: float
    """Length of that gradient, relative to the exact one, less 1."""
    encode_tokens_per_second: float
    decode_tokens_per_second: float
    """With schema, checksum and value checks."""


def gradient_to_hidden(
    positions: Positions, targets: SoftTargets, divergence: Divergence, temperature: float
) -> torch.Tensor:
    """Gradient [T, D] of the soft loss alone with respect to the student's last hidden states, float32."""
    hidden = positions.student_TD.detach().clone().requires_grad_()
    head = positions.student_head
    loss, _ = fused_loss(
        hidden,
        head.weight_VD.detach(),
        None if head.bias_V is None else head.bias_V.detach(),
        head.spec,
        positions.labels_T,
        targets,
        Objective(divergence, temperature),
        chunk_bytes=_CHUNK_BYTES,
        teacher_head=positions.teacher_head,
    )
    loss.backward()
    assert hidden.grad is not None
    return hidden.grad.float()


def exact_gradient(positions: Positions, divergence: Divergence, temperature: float) -> torch.Tensor:
    """The gradient [T, D] that the teacher's own, unrounded distribution gives, chunk by chunk."""
    spec = TargetSpec("dense", temperature=temperature, encoding="float32")
    rows = chunk_rows(positions.teacher_head.spec.vocab_size, _CHUNK_BYTES)
    parts = []
    for start in range(0, len(positions.labels_T), rows):
        part = _cut(positions, slice(start, start + rows))
        targets = _beside(make_targets(part.teacher_TD, part.teacher_head, part.labels_T, spec), part)
        parts.append(gradient_to_hidden(part, targets, divergence, temperature))
    return torch.cat(parts)


def _beside(targets: SoftTargets, positions: Positions) -> SoftTargets:
    """Made on the host, read where the models are."""
    return targets.each(lambda tensor: tensor.to(positions.student_TD.device))


def _cut(positions: Positions, part: slice) -> Positions:
    return Positions(
        positions.labels_T[part],
        positions.teacher_TD[part],
        positions.teacher_head,
        positions.student_TD[part],
        positions.student_head,
    )


@torch.no_grad()
def distribution_error(positions: Positions, targets: SoftTargets, temperature: float) -> tuple[float, float]:
    """(mean KL(p ‖ p_hat), mean squared distance) of the distribution that the payload stands for."""
    vocab_size = positions.teacher_head.spec.vocab_size
    rows = chunk_rows(vocab_size, _CHUNK_BYTES // 4)
    kl = noise = 0.0
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        cut = targets.cut(part)
        logq = torch.log_softmax(positions.student_head.logits(positions.student_TD[part]) / temperature, -1)
        logp = torch.log_softmax(positions.teacher_head.logits(positions.teacher_TD[part]) / temperature, -1)
        teacher = positions.teacher_head.logits(cut.hidden_TD) if isinstance(cut, HiddenTargets) else None
        block, stats = logq * temperature, torch.zeros(len(logq), len(STATS), device=logq.device)
        block_gradient(block, positions.labels_T[part], cut, teacher, Objective(_FORWARD, temperature), stats)
        # That gradient is s(temperature) / temperature = temperature times (q - p_hat).
        estimate = logq.exp() - block / temperature
        noise += float((estimate - logp.exp()).square().sum(dtype=torch.float64))
        log_estimate = estimate.clamp_min(torch.finfo(estimate.dtype).tiny).log()
        kl += float((logp.exp() * (logp - log_estimate)).sum(dtype=torch.float64))
    return math.inf if isinstance(targets, SampledTargets) else kl / len(targets), noise / len(targets)


def measure(
    positions: Positions,
    spec: TargetSpec,
    exact_TD: torch.Tensor,
    divergence: Divergence,
    *,
    temperature: float,
    rounds: int = 3,
) -> Fidelity:
    """Send the positions' targets through the payload and compare; ``exact_TD`` is ``exact_gradient``'s.

    ``temperature`` is the objective's (``hidden`` carries none of its own).
    """
    vocab_size, hidden_size = positions.teacher_head.spec.vocab_size, positions.teacher_TD.shape[1]
    wanted = schema(spec, vocab_size, hidden_size)
    uniforms_T = np.random.default_rng(spec.seed).random(len(positions.labels_T))
    made = make_targets(positions.teacher_TD, positions.teacher_head, positions.labels_T, spec, uniforms_T)
    encode_s, batch = _timed(lambda: encode(made, spec, wanted, vocab_size), rounds)

    def receive() -> SoftTargets:
        arrow.check(batch, wanted)
        arrow.checksum(batch, schema_bytes(spec, vocab_size, hidden_size), b"")
        return decode(batch, spec, vocab_size)

    decode_s, received = _timed(receive, rounds)
    targets = _beside(received, positions)
    kl, noise = distribution_error(positions, targets, temperature)
    gradient = gradient_to_hidden(positions, targets, divergence, temperature)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten().double(), exact_TD.flatten().double(), dim=0)
    return Fidelity(
        spec=spec,
        bytes_per_token=round(batch.nbytes / len(made)),
        kl=kl,
        noise=noise,
        angle_degrees=math.degrees(math.acos(min(1.0, float(cosine)))),
        norm_error=float(gradient.norm() / exact_TD.norm()) - 1,
        encode_tokens_per_second=len(made) / encode_s,
        decode_tokens_per_second=len(made) / decode_s,
    )


def _timed(work: Callable[[], Result], rounds: int) -> tuple[float, Result]:
    """Median seconds after one warm-up, and the last result."""
    result, seconds = work(), []
    for _ in range(rounds):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), result
