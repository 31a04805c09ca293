"""The losses over spans once more, from their definitions, one span and one token at a time, in float64 NumPy."""

import numpy as np

from tests.parity.numpy_losses import between

FLOOR = 1e-6
"""The rest of a distribution is never less."""


def chain(prob: np.ndarray, tokens: list[int]) -> float:
    return float(np.prod([row[token] for row, token in zip(prob, tokens, strict=True)]))


def ranked(own: list[float], other: list[float], most: int | None = None) -> float:
    """Sum over ranks of the differences of sorted probabilities."""
    a, b = sorted(own, reverse=True), sorted(other, reverse=True)
    length = max(len(a), len(b)) if most is None else most
    a, b = a + [0.0] * (length - len(a)), b + [0.0] * (length - len(b))
    return sum(abs(x - y) for x, y in zip(a[:length], b[:length], strict=True))


def gold(
    p: np.ndarray,
    q: np.ndarray,
    theirs: list[int],
    ours: list[int],
    partner: dict[int, int],
    name: str,
    weight: float,
    kept: list[set[int]] | None = None,
) -> float:
    """A span's value: ``p`` [n, teacher's vocabulary] and ``q`` [m, student's], by position; ``kept``: what top-k names there."""
    known = kept is None or all(token in names for token, names in zip(theirs, kept, strict=True))
    text = [chain(p, theirs), chain(q, ours)]
    left_p, left_q = p[0].copy(), q[0].copy()
    left_p[theirs[0]] -= text[0]
    left_q[ours[0]] -= text[1]
    if len(theirs) == 1:
        left_p[theirs[0]] = 0.0
    if len(ours) == 1:
        left_q[ours[0]] = 0.0
    pairs = []
    for u, v in partner.items():
        if kept is not None and u not in kept[0]:
            continue
        if len(ours) == 1 and v == ours[0] and u != theirs[0]:
            text[0] += left_p[u]
        elif len(theirs) == 1 and u == theirs[0]:
            text[1] += left_q[v]
        elif u != theirs[0] or known:
            pairs.append((left_p[u], left_q[v]))
    if known:
        pairs.append((text[0], text[1]))
    rest = [max(1 - sum(side), FLOOR) for side in zip(*pairs, strict=True)] if pairs else [1.0, 1.0]
    both = np.array([*pairs, rest])
    value = float(between(name, both[:, 0], both[:, 1]))
    if not known:
        left_p[theirs[0]] = 0.0
    only_p = [left_p[u] for u in range(len(left_p)) if u not in partner and (kept is None or u in kept[0])]
    only_q = [left_q[v] for v in range(len(left_q)) if v not in partner.values()]
    most = None if kept is None else min(len(only_p), len(only_q))
    return value + weight * ranked(only_p, only_q, most)


def uld(p: np.ndarray, q: np.ndarray, kept: set[int] | None = None) -> float:
    if kept is None:
        return ranked(list(p[0]), list(q[0]))
    names = [p[0][u] for u in kept]
    most = min(len(names), q.shape[1])
    top = sorted(q[0], reverse=True)[: len(names)]
    return ranked(names, list(q[0]), most) + abs((1 - sum(names)) - (1 - sum(top)))
