"""Rows in, soft targets out: the sharded teacher. No Ray, no Flight; other engines must fit behind this face.

T = positions, D = hidden size, R = rows, L = columns.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from kdscale.batch import Batch, ExampleBatch, SoftTargets, TokenBatch
from kdscale.data.images import Pixels
from kdscale.engine.classifiers import PassThrough, is_classifier
from kdscale.engine.described import num_layers
from kdscale.engine.layers import blocks_of, caught_layers
from kdscale.engine.models import head_of, hidden_states, set_head
from kdscale.engine.sharding import InferenceModel, gathered
from kdscale.errors import ModelError, PayloadError
from kdscale.head import Head
from kdscale.spec import TargetSpec
from kdscale.targets.payloads import make_targets, with_layers
from kdscale.targets.sampling import uniforms


@dataclass(frozen=True)
class Score:
    """One request's work: targets of ``spec`` for the trained positions of ``batch``."""

    batch: Batch
    spec: TargetSpec


@dataclass(frozen=True)
class FetchHead:
    """One request's work: a copy of the head on the host."""


Work = Score | FetchHead


class TeacherModel:
    """A lockstep model: every rank calls ``forward`` the same number of times, with whatever work it has."""

    def __init__(
        self, inference: InferenceModel, vocab_size: int, device: torch.device, pixels: Pixels | None = None
    ) -> None:
        """``pixels``: how the model reads images; none reads text."""
        self._model = inference.model
        self._device = device
        self._weight, self._bias, self._spec = head_of(inference.model, vocab_size)
        self._pixels = pixels
        self._classifies = is_classifier(inference.model)
        if self._classifies:
            set_head(inference.model, PassThrough(self._weight, self._bias))
        self.blocks_run = 0
        """So far: what a watcher sees of a forward that takes long. Any thread may read it."""
        for block in _blocks(inference.model):
            block.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.blocks_run += 1

    @torch.no_grad()
    def forward(self, work: list[Work]) -> list[SoftTargets | Head]:
        """The answers to ``work``, in its order and as they are sent; without any to score, one dummy token runs.

        Each call is exactly one pass through the base and one gathering of the head, whatever the work: other ranks
        stand in the same collectives.
        """
        scores = [one for one in work if isinstance(one, Score)]
        with caught_layers(self._model, {layer for one in scores for layer in one.spec.layers}) as caught:
            hidden = iter(self._hidden([one.batch for one in scores]))
        tokens = [one.batch for one in scores if isinstance(one.batch, TokenBatch)]
        inside = {layer: iter(self._trained(states, tokens)) for layer, states in caught.items()}
        answers: list[SoftTargets | Head] = []
        with gathered([one for one in (self._weight, self._bias) if one is not None]):
            head = Head(self._weight, self._bias, self._spec)
            copy = self._copy(head) if any(isinstance(one, FetchHead) for one in work) else None
            for one in work:
                match one:
                    case FetchHead():
                        # All students ask at once, and a head may take gigabytes.
                        assert copy is not None
                        answers.append(copy)
                    case Score(batch=batch, spec=spec):
                        labels = torch.from_numpy(batch.labels())
                        draws = uniforms(batch, spec.seed) if spec.payload == "sampled" else None
                        targets = make_targets(next(hidden), head, labels, spec, draws, as_sent=True)
                        states = {layer: next(of_batches) for layer, of_batches in inside.items()}
                        answers.append(with_layers(targets, [states[layer] for layer in spec.layers]))
        return answers

    def refusal(self, spec: TargetSpec) -> PayloadError | None:
        """Why ``spec`` asks for layers that cannot be had; none where they can. Any thread may ask."""
        if not spec.layers:
            return None
        if self._classifies:
            return PayloadError("layers were asked for of a classifier, which has no states of single tokens")
        last = num_layers(self._model.config)
        if max(spec.layers) > last:
            return PayloadError(f"layers {list(spec.layers)} were asked for; the teacher's are 0 to {last}")
        try:
            blocks_of(self._model)
        except ModelError as error:
            return PayloadError(f"the teacher: {error}")
        return None

    def _hidden(self, batches: list[Batch]) -> list[torch.Tensor]:
        """Final hidden states [T, D] of each batch's trained positions, from one pass over all rows."""
        if self._classifies:
            return self._pooled([batch for batch in batches if isinstance(batch, ExampleBatch)])
        return self._of_tokens([batch for batch in batches if isinstance(batch, TokenBatch)])

    def _pooled(self, batches: list[ExampleBatch]) -> list[torch.Tensor]:
        if not batches:
            pixels = self._pixels
            self._base(
                np.zeros((1, pixels.size if pixels else 1), np.uint8 if pixels else np.int32), np.ones(1, np.int32)
            )
            return []
        columns = max(batch.inputs_RL.shape[1] for batch in batches)
        inputs = np.concatenate([_columns(batch.inputs_RL, columns) for batch in batches])
        hidden_RD = self._base(inputs, np.concatenate([batch.lengths_R for batch in batches]))
        parts = hidden_RD.split([batch.num_rows for batch in batches])
        return [
            part[torch.from_numpy(batch.trained_R).to(self._device)] for part, batch in zip(parts, batches, strict=True)
        ]

    def _of_tokens(self, batches: list[TokenBatch]) -> list[torch.Tensor]:
        if not batches:
            self._base(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32))
            return []
        # Columns that are padding in every row cost nothing.
        columns = max(max(int((batch.segments_RL != 0).any(0).sum()), 1) for batch in batches)
        ids = np.concatenate([_columns(batch.ids_RL, columns) for batch in batches])
        positions = np.concatenate([_columns(batch.positions_RL, columns) for batch in batches])
        return self._trained(self._base(ids, positions).unflatten(0, ids.shape), batches)

    def _trained(self, states_RLD: torch.Tensor, batches: list[TokenBatch]) -> list[torch.Tensor]:
        """States [T, D] of each batch's trained positions, from those of all rows."""
        columns = states_RLD.shape[1]
        parts = states_RLD.split([batch.num_rows for batch in batches])
        return [
            part[torch.from_numpy(_columns(batch.predicts_RL, columns)).to(self._device)]
            for part, batch in zip(parts, batches, strict=True)
        ]

    def _base(self, inputs_RL: np.ndarray, beside: np.ndarray) -> torch.Tensor:
        """See ``hidden_states``."""
        inputs, second = (torch.from_numpy(one).to(self._device) for one in (inputs_RL, beside))
        return hidden_states(self._model, inputs if self._pixels else inputs.long(), second.long(), self._pixels)

    @staticmethod
    def _copy(head: Head) -> Head:
        bias = None if head.bias_V is None else head.bias_V.detach().cpu().clone()
        return Head(head.weight_VD.detach().cpu().clone(), bias, head.spec)


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """What a forward passes one after the other: blocks, or the whole where they cannot be told."""
    try:
        return list(blocks_of(model))
    except ModelError:
        return [model.base_model]


def _columns(plane_RL: np.ndarray, columns: int) -> np.ndarray:
    """The first ``columns`` columns, filled up with zeros where there are fewer.

    Zeros are padding in every plane: positions of 0 make each a document of its own, which nothing else sees.
    """
    short = columns - plane_RL.shape[1]
    return plane_RL[:, :columns] if short <= 0 else np.pad(plane_RL, ((0, 0), (0, short)))
