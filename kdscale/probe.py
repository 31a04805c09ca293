"""``kdscale probe``: what each payload setting costs and loses, on the user's own teacher, student and text. No cluster."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

from kdscale.batch import TokenBatch
from kdscale.config.schedule import value_at
from kdscale.config.schema import RunConfig
from kdscale.config.teachers import require_one_teacher
from kdscale.data.reading import make_loader
from kdscale.engine import process
from kdscale.engine.models import base_hidden, build_student, head_of, load_causal_lm, require_known_head
from kdscale.engine.settings import student_dtype
from kdscale.errors import ConfigError
from kdscale.evaluate.fidelity import Fidelity, Positions, exact_gradient, measure
from kdscale.head import Head
from kdscale.losses.objective import objective_at
from kdscale.prepare import corpus_of, prepare
from kdscale.spec import ENCODINGS, SUPPORT, TargetSpec

_WHOLE_VOCABULARY = 4096  # `dense` is for vocabularies up to this


def probe(
    config: RunConfig, *, tokens: int, max_angle: float, student_rate: float | None, out: Path | None, console: Console
) -> None:
    """Print the table and the recommendation; ``student_rate``: the student's tokens per second, measured if none.

    Raises:
        KdscaleError: what loading models and text raises.
    """
    if config.task != "language-modelling":
        raise ConfigError(
            f"task = {config.task}: over a few classes targets.payload: dense is exact and small; nothing to probe"
        )
    if config.alignment.method is not None:
        raise ConfigError(
            f"alignment.method = {config.alignment.method}: payloads are compared over one vocabulary; set alignment.method=null"
            " alignment.tokenizer=null to compare what the teacher sends"
        )
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens}: at least one position is needed")
    with console.status("loading models and text"):
        positions, measured_rate = load_positions(config, tokens)
    rate = student_rate or measured_rate
    objective = objective_at(config.loss, 0, config.train.steps)
    exact = exact_gradient(positions, objective.divergence, objective.temperature)
    found = []
    specs = [one for one in settings(config, positions) if config.loss.divergence in SUPPORT[one.payload]]
    for spec in track(specs, description="measuring payloads", console=console, transient=True):
        found.append(measure(positions, spec, exact, objective.divergence, temperature=objective.temperature))
    found.sort(key=lambda one: one.bytes_per_token)
    best = recommend(found, max_angle)
    console.print(_table(config, found, best, len(positions.labels_T), rate))
    where = "given" if student_rate else "measured here, forward and backward"
    console.print(f"network at {rate:,.0f} student tokens/s ({where})", highlight=False)
    if best is None:
        console.print(f"no setting keeps the gradient within {max_angle:g} degrees; allow more with --max-angle")
    else:
        console.print(f"smallest within {max_angle:g} degrees: {' '.join(overrides(best.spec))}", highlight=False)
    if out is not None:
        figures = {"tokens": len(positions.labels_T), "student_tokens_per_second": rate, "settings": []}
        figures["settings"] = [asdict(one) | {"kl": None if math.isinf(one.kl) else one.kl} for one in found]
        out.write_text(json.dumps(figures, indent=1) + "\n")


def settings(config: RunConfig, positions: Positions) -> list[TargetSpec]:
    """Every payload at sizes worth comparing, at the run's temperature and seed."""
    vocab_size = positions.teacher_head.spec.vocab_size
    # Not the temperature that the run asks for: with `hidden` that is always 1.
    tau, seed = value_at(config.loss.temperature, 0, config.train.steps), config.run.seed
    specs = [
        TargetSpec("topk", k, tau, encoding)
        for k in (16, 32, 64, 128, 256)
        if k < vocab_size
        for encoding in ENCODINGS["topk"]
    ]
    specs += [TargetSpec("sampled", k, tau, "uint8", "threshold", seed) for k in (6, 12, 24, 48) if k < vocab_size]
    specs += [TargetSpec("sampled", k, tau, "uint8", "replacement", seed) for k in (12, 48) if k < vocab_size]
    specs += [TargetSpec("hidden", encoding=encoding) for encoding in ("bfloat16", "int8")]
    if vocab_size <= _WHOLE_VOCABULARY:
        specs.append(TargetSpec("dense", temperature=tau, encoding="float32"))
    return specs


def recommend(found: list[Fidelity], max_angle: float) -> Fidelity | None:
    """The fewest bytes whose gradient is within the angle."""
    good = [one for one in found if one.angle_degrees <= max_angle]
    return min(good, key=lambda one: one.bytes_per_token, default=None)


def overrides(spec: TargetSpec) -> list[str]:
    """The setting as the command line takes it."""
    lines = [f"targets.payload={spec.payload}", f"targets.encoding={spec.encoding}"]
    if spec.payload in ("topk", "sampled"):
        lines.append(f"targets.k={spec.k}")
    if spec.payload == "sampled":
        lines.append(f"targets.sampler={spec.sampler}")
    return lines


def load_positions(config: RunConfig, tokens: int) -> tuple[Positions, float]:
    """Both models' hidden states at ``tokens`` trained positions, and the student's tokens per second in training."""
    device = torch.device("cuda" if config.student.gpus_per_rank and torch.cuda.is_available() else "cpu")
    process.set_threads(config.student.cpus_per_rank, deterministic=config.run.deterministic)
    process.set_seed(config.run.seed)
    require_one_teacher(config, "kdscale probe")
    prepared = prepare(config)
    corpus = corpus_of(config, prepared, lambda done, total, what: None)
    rows = -(-tokens // (config.data.row_tokens - 1))
    batch = make_loader(corpus.train, config.data, rows, config.run.seed).batch(0)
    assert isinstance(batch, TokenBatch)
    vocab_size = prepared.meaning.vocab_size
    teacher = load_causal_lm(prepared.teacher_directory, process.resolve_dtype(config.teacher.dtype, device)).to(device)  # type: ignore[arg-type]
    require_known_head(teacher)
    teacher_TD, _ = _run(teacher, batch, device, backward=False)
    teacher_head = _head(teacher, vocab_size)
    dtype = process.resolve_dtype(student_dtype(config), device)
    student = build_student(config.student, prepared.teacher_directory, dtype).to(device)  # type: ignore[arg-type]
    student_TD, seconds = _run(student, batch, device, backward=True)
    part = slice(0, tokens)
    positions = Positions(
        torch.from_numpy(batch.labels())[part].to(device),
        teacher_TD[part],
        teacher_head,
        student_TD[part],
        _head(student, vocab_size),
    )
    return positions, batch.num_tokens_real / seconds


def _run(
    model: PreTrainedModel, batch: TokenBatch, device: torch.device, *, backward: bool
) -> tuple[torch.Tensor, float]:
    """Hidden states [T, D] at the trained positions, and the seconds of a second pass (the first warms up)."""
    ids, positions = (torch.from_numpy(plane).long().to(device) for plane in (batch.ids_RL, batch.positions_RL))
    trained = torch.from_numpy(batch.predicts_RL).to(device)
    seconds = 0.0
    for _ in range(2 if backward else 1):
        _finish(device)
        began = time.perf_counter()
        with torch.set_grad_enabled(backward):
            hidden_RLD = base_hidden(model, ids, positions)
            if backward:
                # The head's share: three products of the body's own kind, 2 x D x V a token each.
                logits = model.get_output_embeddings()(hidden_RLD[trained])
                logits.logsumexp(-1).sum().backward()
                model.zero_grad(set_to_none=True)
        _finish(device)
        seconds = time.perf_counter() - began
    return hidden_RLD[trained].detach(), seconds


def _finish(device: torch.device) -> None:
    """A GPU works on behind what was told to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _head(model: PreTrainedModel, vocab_size: int) -> Head:
    weight, bias, spec = head_of(model, vocab_size)
    return Head(weight.detach(), None if bias is None else bias.detach(), spec)


def _table(config: RunConfig, found: list[Fidelity], best: Fidelity | None, tokens: int, rate: float) -> Table:
    title = f"{config.loss.divergence} from {config.teacher.model}, {tokens} positions of the training text"
    table = Table(title=title)
    for column in (
        "payload",
        "bytes/token",
        "KL error",
        "noise",
        "gradient angle",
        "norm",
        "encode/s",
        "decode/s",
        "network",
    ):
        table.add_column(column, justify="left" if column == "payload" else "right")
    for one in found:
        table.add_row(
            name(one.spec),
            str(one.bytes_per_token),
            "-" if math.isinf(one.kl) else f"{one.kl:.1e}",
            f"{one.noise:.1e}",
            f"{one.angle_degrees:.2f}°",
            f"{one.norm_error:+.2%}",
            f"{one.encode_tokens_per_second:,.0f}",
            f"{one.decode_tokens_per_second:,.0f}",
            f"{one.bytes_per_token * rate / 1e6:.2f} MB/s",
            style="bold" if one is best else None,
        )
    return table


def name(spec: TargetSpec) -> str:
    """A payload setting in a few words."""
    match spec.payload:
        case "topk":
            return f"topk {spec.k} {spec.encoding}"
        case "sampled":
            return f"sampled {spec.k} {spec.sampler}"
        case _:
            return f"{spec.payload} {spec.encoding}"
