"""The divergences once more, from their definitions, in float64 NumPy, with gradients by central differences."""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """sum p log(p / q), with 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(-1)


def between(name: str, p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def dense(name: str, student: np.ndarray, teacher: np.ndarray, temperature: float, beta: float) -> np.ndarray:
    return between(name, softmax(teacher / temperature), softmax(student / temperature), beta)


def bucket(prob: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[T, K + 1]: the kept entries and the sum of the others."""
    kept = np.take_along_axis(prob, ids, -1)
    mask = np.ones_like(prob)
    np.put_along_axis(mask, ids, 0.0, -1)
    return np.concatenate([kept, (prob * mask).sum(-1, keepdims=True)], -1)


def topk(
    name: str, student: np.ndarray, teacher: np.ndarray, ids: np.ndarray, temperature: float, beta: float
) -> np.ndarray:
    p, q = bucket(softmax(teacher / temperature), ids), bucket(softmax(student / temperature), ids)
    return between(name, p, q, beta)


def cross_entropy(student: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(np.take_along_axis(softmax(student), labels[:, None], -1))[:, 0]


def gradient(function, at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of a scalar function."""
    result = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        result[index] = (function(up) - function(down)) / (2 * step)
    return result
