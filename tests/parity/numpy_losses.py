"""The divergences once more, from their definitions, in float64 NumPy, with gradients by central differences."""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """sum p log(p / q), with 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(-1)


def between(name: str, p: np.ndarray, q: np.ndarray, beta: float = 0.3, skew: float = 0.2) -> np.ndarray:
    match name:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            mixture = beta * p + (1 - beta) * q
            return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
        case "skew_forward_kl":
            return kl(p, skew * p + (1 - skew) * q)
        case "skew_reverse_kl":
            return kl(q, skew * q + (1 - skew) * p)
        case "tvd":
            return np.abs(p - q).sum(-1) / 2
    raise ValueError(name)


def adaptive_weights(p: np.ndarray, q: np.ndarray, head_mass: float) -> np.ndarray:
    """The weight of the forward KL, one position at a time."""
    weights = []
    for teacher, student in zip(p, q, strict=True):
        running, tail, head = 0.0, 0.0, 0.0
        for index in np.argsort(teacher):
            running += teacher[index]
            gap = abs(teacher[index] - student[index])
            if running <= head_mass:
                tail += gap
            else:
                head += gap
        weights.append(head / (head + tail))
    return np.array(weights)


def dense(
    name: str,
    student: np.ndarray,
    teacher: np.ndarray,
    temperature: float,
    *,
    head_mass: float = 0.6,
    frozen: np.ndarray | None = None,
    **shape: float,
) -> np.ndarray:
    """``frozen``: the student's logits from which ``adaptive_kl`` takes its weights (constants to the gradient)."""
    if name == "logit_mse":
        gap = student - teacher
        return np.square(gap - gap.mean(-1, keepdims=True)).mean(-1)
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    if name == "adaptive_kl":
        weight = adaptive_weights(p, softmax((student if frozen is None else frozen) / temperature), head_mass)
        return weight * kl(p, q) + (1 - weight) * kl(q, p)
    return between(name, p, q, **shape)


def bucket(prob: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[T, K + 1]: the kept entries and the sum of the others."""
    kept = np.take_along_axis(prob, ids, -1)
    mask = np.ones_like(prob)
    np.put_along_axis(mask, ids, 0.0, -1)
    return np.concatenate([kept, (prob * mask).sum(-1, keepdims=True)], -1)


def topk(
    name: str, student: np.ndarray, teacher: np.ndarray, ids: np.ndarray, temperature: float, **shape: float
) -> np.ndarray:
    p, q = bucket(softmax(teacher / temperature), ids), bucket(softmax(student / temperature), ids)
    return between(name, p, q, **shape)


def factor(name: str, temperature: float) -> float:
    """s(temperature)."""
    return {"tvd": temperature, "logit_mse": 1.0}.get(name, temperature**2)


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
