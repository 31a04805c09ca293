"""Head + loss, forward and backward, against the bare matrix products of the same payload.

    python -m tests.benchmarks.loss --json loss.json            # 2 threads, float32, 1024 tokens, 49,152 ids
    python -m tests.benchmarks.loss --vocab 128256 --dtype bfloat16 --tokens 4096    # 17 GiB, 14 of them plain autograd's
    python -m tests.benchmarks.loss --peers .venv-peers/bin/python    # and Liger's (tests/benchmarks/peers.sh makes it)

Control: the products alone (3 for ``topk`` and labels, 4 for ``hidden``), in the same chunks. Every side makes the
gradients of hidden states [T, 576] and head weight [V, 576]. Transient memory is the peak beyond inputs and those gradients
that are there by then (plain autograd makes them last).
"""

import argparse
import json
from pathlib import Path

import torch

from tests.benchmarks.turns import Side, agree, compare, machine, not_yet_owned, serve

WIDTH, K = 576, 64
CHUNK_BYTES = 64 << 20
ROUNDS = 7
GROUPS = (
    ("bare3", "labels", "topk", "topk+hard", "plain-topk"),
    ("bare4", "hidden", "plain-hidden"),
)
"""Sides that run in turns, each group behind its control. What a side keeps between turns (oneDNN's scratch memory is as large as
its largest product) is in the way of no other group."""


def side(name: str, tokens: int, vocab: int, dtype_name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    hidden, weight = draw(tokens, WIDTH).requires_grad_(), draw(vocab, WIDTH, scale=0.05).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    teacher_hidden, teacher_weight = draw(tokens, WIDTH).bfloat16(), draw(vocab, WIDTH, scale=0.05)
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:K].clone() for _ in range(tokens)])
    # Kept entries with 0.9 of the mass, as real text has them; which ids they are makes no difference to the time.
    logp = torch.log_softmax(torch.randn(tokens, K, generator=generator) * 3, -1) + torch.tensor(0.9).log()
    tail = torch.full((tokens,), 0.1).log()
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()

    def finish(loss: torch.Tensor) -> dict[str, float]:
        loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        figures = {"loss": loss.detach().item(), "hidden_norm": _norm(hidden.grad), "weight_norm": _norm(weight.grad)}
        hidden.grad = weight.grad = None
        return figures

    if name in ("bare3", "bare4"):
        serve(lambda: _bare(hidden, weight, teacher_hidden, teacher_weight, products=int(name[-1])), gradients)
    elif name.startswith("liger"):
        serve(lambda: finish(_liger(name, hidden, weight, teacher_hidden.to(dtype), teacher_weight, labels)), gradients)
    elif name.startswith("plain"):
        teacher = (teacher_hidden.to(dtype), teacher_weight)
        serve(lambda: finish(_plain(name, hidden, weight, labels, (ids, logp, tail), teacher)), gradients)
    else:
        from kdscale.batch import HiddenTargets, SoftTargets, TopkTargets
        from kdscale.head import Head, HeadSpec
        from kdscale.losses.divergence import Divergence
        from kdscale.losses.fused import fused_loss
        from kdscale.losses.objective import Objective

        zeros = torch.zeros(tokens)
        targets: dict[str, SoftTargets | None] = {
            "labels": None,
            "topk": TopkTargets(labels.int(), ids.int(), logp, tail, zeros, zeros, 1.0),
            "topk+hard": TopkTargets(labels.int(), ids.int(), logp, tail, zeros, zeros, 1.0),
            "hidden": HiddenTargets(labels.int(), teacher_hidden),
        }
        objective = Objective(Divergence("forward_kl"), hard_weight=0.1 if name == "topk+hard" else 0.0)
        head = Head(teacher_weight, None, HeadSpec(vocab))

        def ours() -> dict[str, float]:
            loss, _ = fused_loss(
                hidden,
                weight,
                None,
                HeadSpec(vocab),
                labels.int(),
                targets[name],
                objective,
                chunk_bytes=CHUNK_BYTES,
                teacher_head=head,
            )
            return finish(loss)

        serve(ours, gradients)


def _norm(gradient: torch.Tensor) -> float:
    """In float32, a few rows at a time: a whole copy would be the largest array of the round."""
    return sum(float(part.float().square().sum()) for part in gradient.split(1024)) ** 0.5


def _rows(tokens: int, vocab: int, item_bytes: int, *, tiles: int) -> int:
    """Rows of the fused loss's own chunks (losses/fused.py), told without kdscale."""
    narrow, most, enough = item_bytes < 4, CHUNK_BYTES // (tiles * item_bytes * vocab), -(-tokens // 16)
    least = enough if narrow and enough <= most else 0
    most = max(min(most, {1: (128, 192), 2: (112, 224)}[tiles][narrow]), least)
    return -(-tokens // -(-tokens // most))


@torch.no_grad()
def _bare(
    hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, teacher_weight: torch.Tensor, products: int
) -> dict[str, float]:
    vocab = len(weight)
    rows = _rows(len(hidden), vocab, weight.element_size(), tiles=products - 2)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    tile = torch.empty(rows, vocab, dtype=weight.dtype)
    for start in range(0, len(hidden), rows):
        part = hidden[start : start + rows]
        logits = torch.mm(part, weight.T, out=tile[: len(part)])
        if products == 4:
            torch.mm(teacher[start : start + rows].to(weight.dtype), teacher_weight.T, out=logits)
        grad_hidden[start : start + rows] = logits @ weight
        grad_weight.addmm_(logits.T, part)
    return {}


def _plain(name: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, topk: tuple, teacher: tuple):
    """Autograd through whole [T, V] arrays."""
    product = hidden @ weight.T
    product.register_hook(lambda _: not_yet_owned())  # the gradients of both come behind it
    logits = product.float()
    del product
    if name == "plain-labels":
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    if name == "plain-hidden":
        logp = torch.log_softmax((teacher[0] @ teacher[1].T).float(), -1)
        return torch.nn.functional.kl_div(torch.log_softmax(logits, -1), logp, log_target=True, reduction="sum")
    ids, logp, tail = topk
    logq = torch.log_softmax(logits, -1)
    kept = logq.gather(1, ids)
    tail_q = torch.log1p(-kept.exp().sum(-1).clamp_max(1 - 1e-6))
    return (logp.exp() * (logp - kept)).sum() + (tail.exp() * (tail - tail_q)).sum()


def _liger(name: str, hidden, weight, teacher_hidden, teacher_weight, labels):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    chunk = {"liger": 1024, "liger-equal-chunk": _rows(len(hidden), len(weight), weight.element_size(), tiles=2)}[name]
    # Their beta = 0 is KL(teacher ‖ student); their loss is a mean over tokens.
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=chunk
    )
    return loss(hidden, weight, teacher_hidden, teacher_weight, labels) * len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of an environment with liger-kernel")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size = (arguments.tokens, arguments.vocab, arguments.dtype, arguments.threads)
    if arguments.side:
        side(arguments.side, *size)
        return
    flags = ["--tokens", str(size[0]), "--vocab", str(size[1]), "--dtype", size[2], "--threads", str(size[3])]
    groups = [[Side(name, [name, *flags]) for name in names] for names in GROUPS]
    if arguments.peers:
        groups[1] += [Side(name, [name, *flags], python=arguments.peers) for name in ("liger", "liger-equal-chunk")]
    tolerance = 1e-4 if size[2] == "float32" else 2e-2
    print(f"T = {size[0]}, V = {size[1]}, D = {WIDTH}, K = {K}, {size[2]}, {size[3]} threads; median, transient memory")
    for group in groups:
        compare("tests.benchmarks.loss", group, arguments.rounds)
        same = [side for side in group if side.name in ("topk", "hidden") or side.name.startswith(("plain", "liger"))]
        for figure in ("loss", "hidden_norm", "weight_norm"):
            agree(same, figure, tolerance)
        report(group)
    labels, both = (next(side for side in groups[0] if side.name == name) for name in ("labels", "topk+hard"))
    print(f"soft + hard loss takes {both.median / labels.median:.2f}x the cross-entropy alone")
    if arguments.json:
        result = {"tokens": size[0], "vocab": size[1], "dtype": size[2], "threads": size[3], "machine": machine()}
        every = [one.as_dict() for group in groups for one in group]
        arguments.json.write_text(json.dumps(result | {"sides": every}, indent=1) + "\n")


def report(group: list[Side]) -> None:
    control = group[0]
    for one in group:
        print(
            f"{one.name:18} {one.median:7.3f} s ±{one.spread:4.0%}  {one.median / control.median:5.2f}x {control.name}"
            f"  {(one.transient_bytes or 0) / 2**20:8.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
