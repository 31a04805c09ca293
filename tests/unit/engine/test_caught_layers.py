"""States caught between blocks are transformers' own, and their gradients reach the blocks."""

from pathlib import Path

import pytest
import torch

from kdscale.config.layers import LayersSection
from kdscale.config.sections import StudentSection
from kdscale.engine.described import num_layers, require_layers
from kdscale.engine.layers import blocks_of, caught_layers
from kdscale.engine.models import base_hidden
from kdscale.errors import ConfigError, ModelError
from tests.conftest import FAMILIES, make_model

IDS = torch.arange(20).unsqueeze(0) * 7 % 300
PLACES = torch.arange(20).unsqueeze(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_transformers_hidden_states(family: str):
    model = make_model(family)
    last = num_layers(model.config)
    with torch.no_grad():
        with caught_layers(model, range(last + 1)) as caught:
            hidden = base_hidden(model, IDS, PLACES)
        assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks_of(model))
        theirs = model(input_ids=IDS, output_hidden_states=True).hidden_states
        assert sorted(caught) == list(range(last + 1))
        assert all(torch.equal(caught[layer], theirs[layer]) for layer in range(last))
        # transformers shows the last one behind the norm.
        assert torch.equal(hidden, theirs[last])
        assert not torch.equal(caught[last], theirs[last])


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_flow_through_them(recomputed: bool):
    """Also where activations are computed again in the backward pass."""
    model = make_model("llama").train()
    if recomputed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with caught_layers(model, [0, 2]) as caught:
        hidden = base_hidden(model, IDS, PLACES)
    (hidden.sum() + caught[2].square().sum() + caught[0].sum()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    plain = make_model("llama").train()
    states = plain.base_model(input_ids=IDS, position_ids=PLACES, output_hidden_states=True)
    loss = states.last_hidden_state.sum() + states.hidden_states[2].square().sum() + states.hidden_states[0].sum()
    loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_blocks_that_are_not_to_be_found_are_refused():
    model = make_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="0 lists of 7 blocks"):
        blocks_of(model)


@pytest.mark.parametrize(
    ("layers", "student", "message"),
    [
        ({"pairs": {1: 5}}, {"layers": [0, 3]}, r"the teacher has no layer 5; its layers are 0 .* to 4"),
        ({"pairs": {3: 4}}, {"layers": [0, 3]}, r"the student has no layer 3; its layers are 0 .* to 2"),
        (
            {"pairs": {1: 1}, "projection": "none"},
            {"init": "config", "config": {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}},
            r"projection = none: the student's states have 16 numbers, the teacher's 32; use .* learned",
        ),
    ],
)
def test_what_the_models_do_not_have_is_refused(layers: dict, student: dict, message: str, teacher_dir: Path):
    with pytest.raises(ConfigError, match=message):
        require_layers(LayersSection.model_validate(layers), StudentSection.model_validate(student), teacher_dir)


def test_what_they_have_is_taken(teacher_dir: Path):
    pairs = LayersSection.model_validate({"pairs": {0: 0, 2: 4}, "projection": "none"})
    require_layers(pairs, StudentSection.model_validate({"layers": [0, 3]}), teacher_dir)
    require_layers(pairs, StudentSection(init="model", model=str(teacher_dir)), teacher_dir)
