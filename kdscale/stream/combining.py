"""Several teachers as one source: each document's own, or a weighted mixture of all.

T = positions, K = named entries, V = vocabulary.
"""

import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kdscale.batch import Batch, DenseTargets, SampledTargets, SoftTargets, TokenBatch
from kdscale.config.schema import RunConfig
from kdscale.errors import CoverageError
from kdscale.spec import TargetSpec
from kdscale.stream.source import Received, TeacherSource

_UNUSED = torch.iinfo(torch.int32).max
"""Sorts behind every token id."""


class SeveralTeachers:
    """What routing and mixture have in common: a source for each teacher, asked at the same time."""

    def __init__(self, sources: Mapping[str, TeacherSource], in_flight: int) -> None:
        """``sources``: by the teachers' names, in the order of the routes; ``in_flight``: batches that are fetched at once."""
        self.sources = dict(sources)
        self._pool = ThreadPoolExecutor(in_flight * len(self.sources), thread_name_prefix="teachers")

    def _ask(self, requests: Mapping[str, tuple[Batch, TargetSpec]]) -> list[SoftTargets]:
        """The answers to one request of each of some teachers. Raises: what the sources raise."""
        calls: list[Future[SoftTargets]] = [
            self._pool.submit(self.sources[name].fetch, *request) for name, request in requests.items()
        ]
        return [call.result() for call in calls]

    @property
    def received(self) -> dict[str, Received]:
        """What the answers of all amounted to, by payload."""
        found: dict[str, Received] = {}
        for source in self.sources.values():
            for payload, received in source.received.items():
                so_far = found.setdefault(payload, Received())
                found[payload] = Received(so_far.bytes + received.bytes, so_far.tokens + received.tokens)
        return found

    def teacher_stats(self) -> list[dict[str, Any]]:
        """Counters of every live rank of every teacher, the main one's first."""
        return [{"teacher": name} | stats for name, source in self.sources.items() for stats in source.teacher_stats()]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for source in self.sources.values():
            source.close()


@dataclass(frozen=True)
class Share:
    """What one teacher has in a batch."""

    batch: TokenBatch
    """Its documents."""
    places: np.ndarray
    """int64, increasing: which of the whole batch's trained positions theirs are."""


class Routed(SeveralTeachers):
    """Each document's targets come from the teacher of its route, which sees no other's documents."""

    def fetch(self, batch: Batch, spec: TargetSpec) -> SoftTargets:
        """Raises: what the sources raise; CoverageError for a batch whose documents have no route."""
        shares = self.shares(batch)
        if not shares:
            return next(iter(self.sources.values())).fetch(batch, spec)
        answers = self._ask({name: (share.batch, spec) for name, share in shares.items()})
        back_T = torch.from_numpy(np.argsort(np.concatenate([share.places for share in shares.values()])))
        return SoftTargets.join(answers).each(lambda tensor: tensor[back_T])

    def shares(self, batch: Batch) -> dict[str, Share]:
        """What of ``batch`` goes to each teacher that has something in it. Raises: CoverageError."""
        if not isinstance(batch, TokenBatch) or batch.routes_RL is None:
            raise CoverageError(f"batch {batch.number} doesn't say which teachers its documents go to")
        routes_T = batch.routes_RL[batch.predicts_RL]
        places = {name: np.flatnonzero(routes_T == route) for route, name in enumerate(self.sources)}
        if (routed := sum(map(len, places.values()))) < len(routes_T):
            raise CoverageError(
                f"batch {batch.number}: {len(routes_T) - routed} of {len(routes_T)} trained tokens go to none of the teachers"
                f" {', '.join(self.sources)}"
            )
        return {
            name: Share(batch.of_route(route), places[name])
            for route, name in enumerate(self.sources)
            if len(places[name])
        }


class Mixture(SeveralTeachers):
    """Every position's targets are of the mean of all teachers' distributions by weights, at the request's temperature."""

    def __init__(self, sources: Mapping[str, TeacherSource], weights: Mapping[str, float], in_flight: int) -> None:
        """``weights``: of each teacher, together 1."""
        super().__init__(sources, in_flight)
        self.weights = [weights[name] for name in self.sources]

    def fetch(self, batch: Batch, spec: TargetSpec) -> SoftTargets:
        """Raises: what the sources raise."""
        # Draws of their own: noise that the teachers don't share shrinks in the mean.
        sampled = spec.payload == "sampled"
        asked = {
            name: (batch, replace(spec, seed=spec.seed + place) if sampled else spec)
            for place, name in enumerate(self.sources)
        }
        return mixed(self._ask(asked), self.weights)


def mixed(parts: list[SoftTargets], weights: list[float]) -> SoftTargets:
    """Targets of ``sum_i w_i p_i``, from those of each p_i at the same positions.

    ``dense``: its log-probabilities, exact up to float32. ``sampled``: the entries of all, each weighted by its teacher's share:
    a mean of unbiased estimates is one of the mean. The mixture's entropy cannot be had from samples; ``entropy`` is the mean of
    the teachers', with which the forward KL's value becomes ``sum_i w_i KL(p_i || q)``: above that to the mixture by what the
    teachers differ among themselves, and of the same gradient.
    """
    dense = [part for part in parts if isinstance(part, DenseTargets)]
    if len(dense) == len(parts):
        weighted = [part.logp_TV + math.log(weight) for part, weight in zip(dense, weights, strict=True)]
        logp_TV = torch.logsumexp(torch.stack(weighted), dim=0).clamp_max_(0.0)
        return replace(dense[0], logp_TV=logp_TV)
    sampled = [part for part in parts if isinstance(part, SampledTargets)]
    if len(sampled) < len(parts):
        raise ValueError(f"{[type(part).__name__ for part in parts]}: mixtures are of dense or of sampled targets")
    entropies = [part.entropy_T * weight for part, weight in zip(sampled, weights, strict=True)]
    ids_TK, weight_TK, count_T = _merged(sampled, weights)
    return replace(
        sampled[0],
        ids_TK=ids_TK,
        weight_TK=weight_TK,
        count_T=count_T,
        kept_T=count_T,
        entropy_T=torch.stack(entropies).sum(0),
    )


def _merged(parts: list[SampledTargets], weights: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids [T, K], weights [T, K], count [T]) of all entries, by id; one that several have drawn stands once."""
    every_TK = [torch.where(_used(part), part.ids_TK, _UNUSED) for part in parts]
    ids_TK, order_TK = torch.cat(every_TK, dim=1).sort(dim=1, stable=True)
    weight_TK = torch.cat([part.weight_TK * weight for part, weight in zip(parts, weights, strict=True)], dim=1)
    first_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    first_TK[:, 1:] = ids_TK[:, 1:] != ids_TK[:, :-1]
    slot_TK = first_TK.cumsum(1) - 1
    count_T = (first_TK & (ids_TK != _UNUSED)).sum(1).int()
    widest = int(count_T.max()) if len(count_T) else 0
    weight_TK = torch.zeros_like(weight_TK).scatter_add_(1, slot_TK, weight_TK.gather(1, order_TK))
    ids_TK = torch.zeros_like(ids_TK).scatter_(1, slot_TK, ids_TK)
    used_TK = torch.arange(widest) < count_T[:, None]
    return ids_TK[:, :widest].where(used_TK, 0), weight_TK[:, :widest].where(used_TK, 0.0), count_T


def _used(targets: SampledTargets) -> torch.Tensor:
    return torch.arange(targets.ids_TK.shape[1]) < targets.count_T[:, None]


def combined(sources: Mapping[str, TeacherSource], config: RunConfig) -> Routed | Mixture:
    """The sources of the config's teachers as the config combines them."""
    if config.teachers.combine == "routing":
        return Routed(sources, config.stream.in_flight)
    return Mixture(sources, config.teachers.weights, config.stream.in_flight)
