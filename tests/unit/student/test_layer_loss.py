"""The student's side of layer pairs: the loss is its definition, and projections start where they say."""

import pytest
import torch

from kdscale.config.layers import LayersSection
from kdscale.losses.divergence import Divergence
from kdscale.losses.objective import Objective
from kdscale.spec import TargetSpec
from kdscale.student.layers import LayerLoss, parameters_of, projection
from kdscale.student.module import SUMS, StudentModule
from kdscale.targets.payloads import make_targets, with_layers
from tests.conftest import make_model
from tests.unit.losses.test_layer_distance import reference

IDS = torch.arange(20).unsqueeze(0) * 7 % 300
PLACES = torch.arange(20).unsqueeze(0)
TRAINED = torch.tensor([0, 3, 4, 11])
LABELS = torch.tensor([5, 6, 7, 8], dtype=torch.int32)


def section(**fields: object) -> LayersSection:
    return LayersSection.model_validate({"pairs": {1: 6, 0: 2, 2: 2}, **fields})


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_loss_is_the_sum_over_pairs_and_positions(distance: str):
    model = make_model("qwen2")
    layers = LayerLoss(section(distance=distance), model, teacher_width=12, seed=3)
    module = StudentModule(model, 300, 1 << 20, layers=layers)
    teacher = make_model("qwen2", seed=1)
    generator = torch.Generator().manual_seed(0)
    asked = TargetSpec("topk", k=8, layers=(2, 6))
    states = [torch.randn(4, 12, generator=generator) for _ in asked.layers]
    from kdscale.engine.models import head_of
    from kdscale.head import Head

    head = Head(*head_of(teacher, 300))
    targets = with_layers(make_targets(torch.randn(4, 32, generator=generator), head, LABELS, asked), states)
    plain = model.base_model(input_ids=IDS, position_ids=PLACES, output_hidden_states=True)
    # The student's last layer (2) is taken before its norm.
    blocks: dict[int, torch.Tensor] = {}
    model.base_model.layers[1].register_forward_hook(lambda *given: blocks.update({2: given[2]}))

    found = {}
    for weight in (0.0, 0.5):
        module.zero_grad()
        module.expect(Objective(Divergence("forward_kl"), layer_weight=weight), targets)
        loss, stats = module(IDS, PLACES, TRAINED, LABELS)
        loss.backward()
        grads = [one.weight.grad.clone() for one in layers.projections]
        found[weight] = float(loss), dict(zip(SUMS, stats.tolist(), strict=True)), grads
    ours = {0: plain.hidden_states[0], 1: plain.hidden_states[1], 2: blocks[2]}
    theirs = {2: targets.layers_TND[:, 0], 6: targets.layers_TND[:, 1]}
    expected = sum(
        reference(
            distance,  # type: ignore[arg-type]
            project(ours[mine].flatten(0, 1)[TRAINED]).detach().double().numpy(),
            theirs[its].double().numpy(),
        ).sum()
        for project, (mine, its) in zip(layers.projections, {1: 6, 0: 2, 2: 2}.items(), strict=True)
    )
    assert found[0.5][1]["layer_loss"] == pytest.approx(expected, rel=1e-5)
    assert found[0.5][0] == pytest.approx(found[0.0][0] + 0.5 * expected, rel=1e-5)
    assert all(float(grad.abs().max()) > 0 for grad in found[0.5][2])
    assert all(float(grad.abs().max()) == 0 for grad in found[0.0][2])


def test_projections_start_as_identity_or_orthogonal():
    assert torch.equal(projection(5, 5, seed=1).weight, torch.eye(5))
    wide, again, other = (projection(4, 9, seed).weight for seed in (1, 1, 2))
    torch.testing.assert_close(wide.T @ wide, torch.eye(4))
    assert torch.equal(wide, again)
    assert not torch.equal(wide, other)
    narrow = projection(9, 4, seed=1).weight
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(4))


def test_what_a_checkpoint_calls_them():
    model = make_model("llama")
    layers = LayerLoss(section(), model, teacher_width=8, seed=0)
    own = set(dict(model.named_parameters()))
    projections = {f"loss.layers.projections.{n}.weight" for n in range(3)}
    assert set(parameters_of(model, layers)) == own | projections
    assert set(parameters_of(model, LayerLoss(section(projection="none"), model, 32, 0))) == own
