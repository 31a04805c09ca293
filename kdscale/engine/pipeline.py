"""A model cut into stages under DeepSpeed's pipeline engine. Every rank builds the whole model and keeps its stage of it."""

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import pairwise
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn
from transformers import PreTrainedModel

from kdscale.engine.capture import install
from kdscale.engine.families import Activations, in_sequence
from kdscale.engine.stages import Sample, balanced, measured_seconds
from kdscale.errors import ModelError
from kdscale.topology import Topology

_TIED = "embedding"


class _Ready(LayerSpec):
    """A spec of a module that exists already, with the weights the student starts from."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(type(module))
        self._module = module

    def build(self, log: bool = False) -> nn.Module:
        return self._module


class _ReadyTied(TiedLayerSpec):
    """The same; DeepSpeed sums the gradient of its ``weight`` with that of the other module of this kind."""

    def __init__(self, module: nn.Module, weight: str) -> None:
        super().__init__(_TIED, type(module), tied_weight_attr=weight)
        self._module = module

    def build(self, log: bool = False) -> nn.Module:
        return self._module


class _Module(PipelineModule):
    """Cut at ``bounds``; by trained parameters without them."""

    def __init__(self, specs: list[LayerSpec], stages: int, bounds: list[int] | None) -> None:
        self._bounds = bounds
        super().__init__(specs, num_stages=stages, loss_fn=None, partition_method="parameters")

    def _partition_layers(self, method: str = "uniform") -> None:
        if self._bounds is None:
            super()._partition_layers(method)
            return
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class Pipeline:
    """This rank's stage of ``model``, with its engine.

    The last stage ends in ``head``: a module from ``Activations`` to a scalar loss, whose ``head_weight`` (dotted name)
    is the weight of the model's head. After construction ``model`` keeps its shape everywhere, its weights only here.

    Raises:
        ModelError: a family that cannot be cut, or a stage that would have nothing to train.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: nn.Module,
        head_weight: str,
        settings: dict[str, Any],
        topology: Topology,
        sample: Sample | None = None,
    ) -> None:
        """``sample``: cut by what the modules are measured to take on it, instead of by their trained parameters."""
        self._topology = topology
        modules = [*in_sequence(model), head]
        weight = head.get_parameter(head_weight)
        # A frozen weight has no gradient to sum, and is the same on both stages for good.
        tied = weight is model.get_input_embeddings().weight and weight.requires_grad
        specs: list[LayerSpec] = [_Ready(module) for module in modules]
        if tied:
            # Of a tied module, DeepSpeed leaves every parameter on the later stage out of the gradient's norm, so the head is
            # one of its own, without the last norm.
            specs[0], specs[-1] = _ReadyTied(modules[0], "tokens.weight"), _ReadyTied(head, head_weight)
        cut = None
        if sample is not None:
            device = torch.device(get_accelerator().current_device_name())
            cut = balanced(measured_seconds(modules, sample, device), topology.pipeline)
        # It prints the partition, from rank 0.
        with redirect_stdout(io.StringIO()):
            module = _Module(specs, topology.pipeline, cut)
        bounds: list[int] = module.parts
        stages = [modules[start:stop] for start, stop in pairwise(bounds)]
        _require_work(stages)
        owner = {
            id(one): stage for stage, part in reversed([*enumerate(stages)]) for m in part for one in m.parameters()
        }
        here = topology.stage(dist.get_rank())
        self._owner = {name: owner[id(parameter)] for name, parameter in model.named_parameters()}
        """Parameter name -> the (first) stage that holds it."""
        self._held = {name: one for name, one in model.named_parameters() if self._owner[name] == here}
        self._shapes = {name: (one.shape, one.dtype) for name, one in model.named_parameters()}
        here_too = {id(one) for m in stages[here] for one in m.parameters()}
        self.parameters = {name: one for name, one in model.named_parameters() if id(one) in here_too}
        """All that lie on this stage, by the model's names; a tied weight lies on two."""
        # The specs keep the other stages' weights alive.
        module._layer_specs = []
        for stage, part in enumerate(stages):
            if stage != here:
                for other in part:
                    other.to("meta")
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.engine: PipelineEngine = deepspeed.initialize(model=module, model_parameters=trained, config=settings)[0]
        install(self.engine)

    def train(self, inputs: Iterator[Activations | None]) -> None:
        """One optimizer step over as many micro-batches as the settings say; every rank calls it.

        ``inputs`` is asked on the first and the last stage, once before each micro-batch's forward; only the first needs
        its answer, (ids, positions), of one shape in all steps.
        """
        self.engine.train_batch((one, None) for one in inputs)

    @torch.no_grad()
    def evaluate(self, inputs: Iterator[Activations | None], count: int) -> None:
        """The forward of ``count`` micro-batches of one shape, in evaluation mode; every rank calls it."""
        # What the stages send each other has a fixed shape between two resets.
        self.engine.reset_activation_shape()
        self.engine.eval_batch(
            ((one, None) for one in inputs),
            compute_loss=False,
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=count,
        )
        self.engine.reset_activation_shape()

    def whole_state(self) -> dict[str, torch.Tensor]:
        """All parameters by the model's names on rank 0 (elsewhere empty), sent one by one; every rank calls it."""
        rank = dist.get_rank()
        state: dict[str, torch.Tensor] = {}
        for name, (shape, dtype) in self._shapes.items():
            source = self._owner[name] * self._topology.data
            if rank == source:
                held = self._held[name].detach()
                if rank == 0:
                    state[name] = held.cpu().clone()
                else:
                    dist.send(held.contiguous(), 0)
            elif rank == 0:
                received = torch.empty(shape, dtype=dtype, device=self.engine.device)
                dist.recv(received, source)
                state[name] = received.cpu()
        return state


def _require_work(stages: list[list[nn.Module]]) -> None:
    for number, part in enumerate(stages):
        if not any(one.requires_grad for module in part for one in module.parameters()):
            sizes = [len(stage) for stage in stages]
            raise ModelError(
                f"student.parallel.pipeline = {len(stages)}: stage {number} would have nothing to train (embedding, layers,"
                f" norm and head are dealt out as {sizes}, by trained parameters or time); use fewer stages, more layers, or"
                " freeze less"
            )
