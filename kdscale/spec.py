"""What a student asks a teacher for at each position, and what can be learned from it; what a model is to write. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "adaptive_kl", "logit_mse"
]
DIVERGENCES: tuple[DivergenceName, ...] = get_args(DivergenceName)
SEPARABLE: tuple[DivergenceName, ...] = DIVERGENCES[:6]
"""Sums over outcomes: these can be had over K kept entries and a tail as well."""
LayerDistance = Literal["mse", "cosine"]
"""Between hidden states of a student's layer and of a teacher's; ``losses.layers`` defines each."""
Finish = Literal["end", "stop", "length"]
"""Why a continuation ends; see ``Continuation``."""
Task = Literal["language-modelling", "sequence-classification", "image-classification"]
"""What a position is: a token, or a whole text or image. What is predicted there: the next token, or the class."""
Payload = Literal["topk", "sampled", "hidden", "dense"]
Encoding = Literal["float16", "uint8", "uint4", "bfloat16", "int8", "float32"]
Sampler = Literal["threshold", "replacement"]
ENCODINGS: dict[Payload, tuple[Encoding, ...]] = {
    "topk": ("float16", "uint8", "uint4"),
    "sampled": ("float16", "uint8"),
    "hidden": ("bfloat16", "int8"),
    "dense": ("float32",),
}
"""How numbers can travel, by payload; the first is the default."""
SUPPORT: dict[Payload, tuple[DivergenceName, ...]] = {
    "topk": SEPARABLE,
    "sampled": ("forward_kl",),
    "hidden": DIVERGENCES,
    "dense": DIVERGENCES,
}
"""Which divergences a payload carries the numbers for."""


@dataclass(frozen=True)
class TargetSpec:
    """What a request asks for at each trained position: its request identity, together with the packed tokens."""

    payload: Payload
    k: int = 0
    """Entries (``topk``), or the most of them (``sampled``)."""
    temperature: float = 1.0
    """Applied before truncation; ``hidden`` has none."""
    encoding: Encoding = "float16"
    """One of ``ENCODINGS[payload]``."""
    sampler: Sampler = "threshold"
    """``sampled``: how entries are drawn."""
    seed: int = 0
    """``sampled``: what draws depend on besides the tokens and the batch number."""
    layers: tuple[int, ...] = ()
    """Layers whose hidden states are wanted as well, ascending: 0 is what the first block is given, i what block i puts out."""
    layers_encoding: Encoding = "bfloat16"
    """How those travel: one of ``ENCODINGS["hidden"]``."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values; without layers they are not named, and the request is what it was before there were any."""
        fields = dict(vars(self))
        layers, encoding = fields.pop("layers"), fields.pop("layers_encoding")
        return fields | {"layers": list(layers), "layers_encoding": encoding} if layers else fields

    @staticmethod
    def of(fields: Mapping[str, Any]) -> "TargetSpec":
        """From ``as_dict``'s result. Raises: TypeError, ValueError for other fields."""
        return TargetSpec(**{**fields, "layers": tuple(map(int, fields.get("layers", ())))})


@dataclass(frozen=True)
class Sampling:
    """How a model writes on: with the prompt and its number, all that a continuation follows from."""

    new_tokens: int
    """Most tokens of a continuation."""
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this much of the probability."""
    stop: tuple[str, ...] = ()
    """Texts before which a continuation ends."""
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Prompt:
    """What a continuation is written behind."""

    ids: tuple[int, ...]
    """At least one."""
    number: int
    """The continuation's draws follow from it and the seed, not from what stands beside it in a batch."""


@dataclass(frozen=True)
class Continuation:
    """What was written behind a prompt."""

    ids: tuple[int, ...]
    """Without the end token."""
    finish: Finish
    """end: an end token; stop: the text to stop at has come (it is the caller's to cut); length: ``new_tokens`` were too few."""
