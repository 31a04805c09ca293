"""A causal language model as a sequence of modules that a pipeline may cut anywhere: embedding, layers, norm.

R = rows, L = columns, D = hidden size. What goes from module to module is (hidden [R, L, D], positions [R, L]): positions
restart with every document, so masks and rotary embeddings are made from them, wherever a stage begins.
"""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from kdscale.engine.cuttable import Family, family_of
from kdscale.errors import ModelError

Activations = tuple[torch.Tensor, torch.Tensor]
"""(hidden [R, L, D], positions [R, L]); before the embedding (ids [R, L], positions [R, L])."""


def in_sequence(model: PreTrainedModel) -> list[nn.Module]:
    """The model's own embedding, layers and norm, each in a module from ``Activations`` to ``Activations``.

    Applied one after the other they give the input of the head, ``models.base_hidden``.

    Raises:
        ModelError: a family that is not on the list, or bidirectional attention.
    """
    config = model.config
    family = family_of(config.model_type)
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError("use_bidirectional_attention = true is no causal language model; it cannot be cut into stages")

    def part(name: str | None) -> nn.Module | None:
        return None if name is None else model.base_model.get_submodule(name)

    surroundings = _Surroundings(config, part(family.rotary), by_kind=family.rotary_by_kind)
    embedding, layers, norm = (
        model.base_model.get_submodule(n) for n in (family.embedding, family.layers, family.norm)
    )
    kinds = _attention_kinds(family, config)
    assert isinstance(layers, nn.ModuleList)
    return [
        Embedding(embedding, part(family.places), part(family.dropout)),
        *(Layer(layer, kind, surroundings) for layer, kind in zip(layers, kinds, strict=True)),
        Norm(norm),
    ]


def _attention_kinds(family: Family, config: PretrainedConfig) -> list[str]:
    match family.attention:
        case "by_layer":
            return list(config.layer_types)
        case "window" if config.sliding_window is not None:
            return ["sliding_attention"] * config.num_hidden_layers
        case _:
            return ["full_attention"] * config.num_hidden_layers


class _Surroundings:
    """Mask and rotary embeddings of the rows at hand, made once for all layers of a stage that attend alike.

    No module: the layers share it, and it holds nothing to train, to cast or to save (rotary frequencies stay float32).
    """

    def __init__(self, config: PretrainedConfig, rotary: nn.Module | None, *, by_kind: bool) -> None:
        self._config, self._rotary, self._by_kind = config, rotary, by_kind
        self._positions: torch.Tensor | None = None
        self._made: dict[str, dict[str, Any]] = {}

    def of(self, kind: str, hidden_RLD: torch.Tensor, positions_RL: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of a layer that attends by ``kind``."""
        if self._positions is not positions_RL:
            self._positions, self._made = positions_RL, {}
        if kind not in self._made:
            self._made[kind] = self._make(kind, hidden_RLD, positions_RL)
        return self._made[kind]

    def _make(self, kind: str, hidden_RLD: torch.Tensor, positions_RL: torch.Tensor) -> dict[str, Any]:
        make_mask = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        # Without a mask and a cache, transformers reads the documents off the restarting positions.
        mask = make_mask(
            config=self._config,
            inputs_embeds=hidden_RLD,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions_RL,
        )
        made: dict[str, Any] = {"attention_mask": mask, "position_ids": positions_RL}
        if self._rotary is not None:
            kinds = (kind,) if self._by_kind else ()
            made["position_embeddings"] = self._rotary(hidden_RLD, positions_RL, *kinds)
        return made


class Embedding(nn.Module):
    """(ids, positions) -> (hidden, positions)."""

    def __init__(self, tokens: nn.Module, places: nn.Module | None, dropout: nn.Module | None) -> None:
        super().__init__()
        self.tokens = tokens
        self.places = places
        self.dropout = dropout

    def forward(self, inputs: Activations) -> Activations:
        ids_RL, positions_RL = inputs
        hidden_RLD = self.tokens(ids_RL)
        if self.places is not None:
            hidden_RLD = hidden_RLD + self.places(positions_RL)
        if self.dropout is not None:
            hidden_RLD = self.dropout(hidden_RLD)
        return hidden_RLD, positions_RL


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, layer: nn.Module, kind: str, surroundings: _Surroundings) -> None:
        super().__init__()
        self.layer = layer
        self._kind = kind
        self._surroundings = surroundings

    def forward(self, inputs: Activations) -> Activations:
        hidden_RLD, positions_RL = inputs
        return self.layer(hidden_RLD, **self._surroundings.of(self._kind, hidden_RLD, positions_RL)), positions_RL


class Norm(nn.Module):
    """The last norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, inputs: Activations) -> Activations:
        hidden_RLD, positions_RL = inputs
        return self.norm(hidden_RLD), positions_RL
