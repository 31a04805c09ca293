"""Payload formats on real logits of real text: bytes a token against error, and the codec's speed against memcpy.

    bash launch/quickstart.sh --inputs     # once: fetches teacher and text
    python -m tests.benchmarks.payload --json payload.json      # 1,024 positions of configs/quickstart.yaml

Every format stands for a distribution p_hat over the whole vocabulary: its entries, and what they leave spread evenly over
the other ids. ``KL``: KL(p || p_hat) in nats, ``rounding``: what of it is not the even tail. ``noise``: E|p_hat - p|^2.

Controls: DistillKit's two published settings, written from their description (ids at ceil(log2 V) bits, likeliest first;
``exact_k`` log-probabilities in bfloat16; a least-squares curve through the others, its coefficients in float32):
``ceil(K ceil(log2 V) / 8) + 2 exact_k + 4 terms`` bytes. Draws with replacement (arXiv 2503.16870): three bytes a distinct
id. Raw top-k: int32 ids and float32 log-probabilities. kdscale's bytes hold label, entropy and tail as well. Speed of
encoding and decoding (with value checks, without checksum): in turns with a copy of the decoded arrays, equal
threads, memory managed as by a rank on processors.
"""

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdscale.batch import SampledTargets, SoftTargets, TopkTargets
from kdscale.config import load_config
from kdscale.evaluate.fidelity import Positions
from kdscale.probe import load_positions
from kdscale.spec import ENCODINGS, TargetSpec
from kdscale.targets.decode import decode
from kdscale.targets.encode import encode
from kdscale.targets.layout import row_bytes, schema
from kdscale.targets.payloads import make_targets
from tests.benchmarks.turns import alternate, machine, manage_memory_as_a_rank, spread

ROUNDS = 15
MESSAGE = 4096
DISTILLKIT = (("recommended", 128, 16, (0, 1, 2, 3, 4, 0.5)), ("budget", 50, 1, (0, 1, 0.5)))
"""Name, k, exact_k, powers of the curve's terms."""
CODECS = (
    TargetSpec("topk", 64, encoding="float16"),
    TargetSpec("topk", 64, encoding="uint8"),
    TargetSpec("topk", 64, encoding="uint4"),
    TargetSpec("sampled", 12, encoding="uint8"),
    TargetSpec("hidden", encoding="bfloat16"),
    TargetSpec("hidden", encoding="int8"),
)


@dataclass
class Row:
    """One format, measured."""

    name: str
    bytes_per_token: float
    kl: float | None
    rounding: float | None
    noise: float


def row(name: str, size: float, logp_TV: torch.Tensor, targets: SoftTargets) -> Row:
    """``targets`` as received, against the true distribution."""
    vocab = logp_TV.shape[1]
    if isinstance(targets, SampledTargets):
        estimate = torch.zeros_like(logp_TV).scatter_add_(1, targets.ids_TK.long(), targets.weight_TK)
        return Row(name, size, None, None, _noise(estimate, logp_TV))
    assert isinstance(targets, TopkTargets)
    ids = targets.ids_TK.long()
    rest = vocab - ids.shape[1]
    even_TV = (
        (targets.tail_logp_T - math.log(rest))[:, None].expand_as(logp_TV).clone().scatter_(1, ids, targets.logp_TK)
    )
    true_tail_T = logp_TV.exp().scatter(1, ids, 0.0).sum(-1)
    exact_TV = (true_tail_T.log() - math.log(rest))[:, None].expand_as(logp_TV)
    exact_TV = exact_TV.clone().scatter_(1, ids, logp_TV.gather(1, ids))
    kl, unrounded = (float((logp_TV.exp() * (logp_TV - other)).sum(-1).mean()) for other in (even_TV, exact_TV))
    return Row(name, size, kl, kl - unrounded, _noise(even_TV.exp(), logp_TV))


def _noise(estimate_TV: torch.Tensor, logp_TV: torch.Tensor) -> float:
    return float((estimate_TV - logp_TV.exp()).square().sum(-1).mean())


def distillkit(logp_TV: torch.Tensor, k: int, exact_k: int, terms: tuple[float, ...]) -> tuple[float, TopkTargets]:
    """(bytes, what comes back); ``terms`` are the curve's powers of the rank."""
    values, ids = logp_TV.topk(k)
    ranks = torch.arange(k - exact_k, dtype=torch.float64) / (k - exact_k)
    powers = torch.stack([ranks**term for term in terms], 1)
    curve = torch.linalg.lstsq(powers, values[:, exact_k:].double().T).solution.float()
    back = torch.cat([values[:, :exact_k].bfloat16().float(), (powers.float() @ curve).T], 1)
    size = math.ceil(k * math.ceil(math.log2(logp_TV.shape[1])) / 8) + 2 * exact_k + 4 * len(terms)
    return size, _normalised(ids, back)


def _normalised(ids_TK: torch.Tensor, logp_TK: torch.Tensor) -> TopkTargets:
    """Kept entries and what they leave, as one distribution."""
    mass = logp_TK.exp().sum(-1)
    excess = mass.clamp_min(1.0).log()
    tail = (1 - mass).clamp_min(1e-9).log() - excess
    none = torch.zeros(len(ids_TK))
    return TopkTargets(none.int(), ids_TK.int(), logp_TK - excess[:, None], tail, none, none, 1.0)


def ours(positions: Positions, spec: TargetSpec) -> tuple[SoftTargets, float]:
    """Through the Arrow form and back, and the bytes a position took."""
    vocab, width = positions.teacher_head.spec.vocab_size, positions.teacher_TD.shape[1]
    uniforms = np.random.default_rng(0).random(len(positions.labels_T))
    made = make_targets(positions.teacher_TD, positions.teacher_head, positions.labels_T, spec, uniforms)
    batch = encode(made, spec, schema(spec, vocab, width), vocab)
    return decode(batch, spec, vocab), batch.nbytes / len(made)


def formats(positions: Positions, logp_TV: torch.Tensor) -> list[Row]:
    vocab, width = logp_TV.shape[1], positions.teacher_TD.shape[1]

    def mine(name: str, spec: TargetSpec) -> Row:
        back, size = ours(positions, spec)
        return row(f"kdscale {name}, {spec.encoding}", size, logp_TV, back)

    rows = []
    for name, k, exact_k, terms in DISTILLKIT:
        size, back = distillkit(logp_TV, k, exact_k, terms)
        rows.append(row(f"DistillKit {name}, k = {k}", size, logp_TV, back))
        values, ids = logp_TV.topk(k)
        rows.append(row(f"raw top-k, k = {k}", 8 * k, logp_TV, _normalised(ids, values)))
        fewer = [TargetSpec("topk", n, encoding="uint4") for n in range(1, k + 20)]
        largest = max((one for one in fewer if row_bytes(one, vocab, width) <= 0.8 * size), key=lambda one: one.k)
        rows.append(mine(f"topk, k = {largest.k}", largest))
    rows += [mine("topk, k = 64", TargetSpec("topk", 64, encoding=encoding)) for encoding in ENCODINGS["topk"]]
    samples = [
        mine(f"sampled, k = {k}", TargetSpec("sampled", k, encoding="uint8"))
        for k in (6, 8, 10, 12, 16, 20, 24, 32, 48)
    ]
    for draws in (12, 20, 50):
        spec = TargetSpec("sampled", draws, sampler="replacement")
        found, size = ours(positions, spec)
        assert isinstance(found, SampledTargets)
        distinct = float(found.count_T.double().mean())
        name = f"{draws} draws with replacement, {distinct:.1f} ids"
        # As published: 3 bytes an id, and what kdscale sends as well: label and number of ids.
        rows += [
            row(f"{name}, published", 3 * distinct + 3, logp_TV, found),
            row(f"{name}, kdscale", size, logp_TV, found),
        ]
    return rows + samples


def codec(positions: Positions, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Encode and decode of messages of 4,096 positions, ``tokens`` in all, and a copy of the decoded arrays."""
    vocab, width = positions.teacher_head.spec.vocab_size, positions.teacher_TD.shape[1]
    results = []
    for spec in CODECS:
        uniforms = np.random.default_rng(0).random(len(positions.labels_T))
        made = make_targets(positions.teacher_TD, positions.teacher_head, positions.labels_T, spec, uniforms)
        made = SoftTargets.join([made] * -(-MESSAGE // len(made))).cut(slice(0, MESSAGE))
        wanted = schema(spec, vocab, width)
        batches = [encode(made, spec, wanted, vocab) for _ in range(tokens // MESSAGE)]
        decoded = [plane for batch in batches for plane in decode(batch, spec, vocab).tensors()]
        copies = [torch.empty_like(one) for one in decoded]
        works = {
            "memcpy": lambda copies=copies, decoded=decoded: [a.copy_(b) for a, b in zip(copies, decoded, strict=True)],
            "encode": lambda made=made, spec=spec, wanted=wanted: [
                encode(made, spec, wanted, vocab) for _ in range(tokens // MESSAGE)
            ],
            "decode": lambda batches=batches, spec=spec: [decode(batch, spec, vocab) for batch in batches],
        }
        seconds = alternate(works, rounds)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        results.append(
            {
                "payload": f"{spec.payload} {spec.k or width}, {spec.encoding}",
                "tokens": tokens,
                "decoded_bytes": sum(one.nbytes for one in decoded),
                **{f"{name}_seconds": value for name, value in medians.items()},
                **{f"{name}_spread": spread(values) for name, values in seconds.items()},
                "encode_of_memcpy": medians["memcpy"] / medians["encode"],
                "decode_of_memcpy": medians["memcpy"] / medians["decode"],
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--tokens", type=int, default=1024, help="positions of real text")
    parser.add_argument(
        "--codec-tokens", type=int, default=32_768, help="positions of a codec round, in messages of 4,096"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    manage_memory_as_a_rank()
    positions, _ = load_positions(load_config(arguments.config), arguments.tokens)
    torch.set_num_threads(arguments.threads)
    logp_TV = torch.log_softmax(positions.teacher_head.logits(positions.teacher_TD), -1)
    rows = formats(positions, logp_TV)
    print(f"{arguments.tokens} positions, V = {logp_TV.shape[1]}")
    for one in rows:
        kl = "" if one.kl is None else f"KL {one.kl:.4f}  rounding {one.rounding:.1e}"
        print(f"{one.name:38} {one.bytes_per_token:6.0f} B  {kl:32}  noise {one.noise:.1e}")
    speeds = codec(positions, arguments.codec_tokens, arguments.rounds)
    print(f"codec: {arguments.codec_tokens} positions, {arguments.threads} thread(s); speed as a share of memcpy's")
    for speed in speeds:
        print(
            f"{speed['payload']:22} {speed['decoded_bytes'] / 2**20:6.1f} MiB  encode {speed['encode_of_memcpy']:.2f}x"
            f"  decode {speed['decode_of_memcpy']:.2f}x ±{speed['decode_spread']:.0%}"
        )
    if arguments.json:
        result = {"formats": [asdict(one) for one in rows], "codec": speeds, "machine": machine()}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
