"""Adapters: the student starts as its base, nothing else trains, and merged it is a plain model that computes the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdscale.config.sections import LoraSection, StudentSection
from kdscale.engine.export import whole_state, write_model
from kdscale.engine.lora import add_adapters
from kdscale.engine.models import build_student
from kdscale.errors import ModelError
from kdscale.losses.divergence import Divergence
from kdscale.losses.objective import Objective
from kdscale.student.module import StudentModule
from tests.conftest import make_model

IDS = torch.arange(40).unsqueeze(0) * 7 % 300


def adapted(family: str, **fields: object) -> PreTrainedModel:
    model = make_model(family)
    add_adapters(model, LoraSection.model_validate({"rank": 4, **fields}), torch.float32)
    return model


def stir(model: PreTrainedModel) -> None:
    """As if the adapters had been trained."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize(("family", "targets"), [("llama", ["_proj$"]), ("gpt2", ["c_attn$", "mlp.c_"])])
def test_merged_it_is_a_plain_model(family: str, targets: list[str], tmp_path: Path):
    base, model = make_model(family), adapted(family, targets=targets)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert all(".lora_" in name for name in trained)
        stir(model)
        expected = model(input_ids=IDS).logits
        assert (expected - base(input_ids=IDS).logits).abs().max() > 0.1
        write_model(model, whole_state(model, 0), tmp_path / "plain", lambda directory: None, 5 << 30)
        plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        torch.testing.assert_close(plain.eval()(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_adapters_and_no_frozen_head():
    model = adapted("qwen2", whole=["norm.weight"])
    student = StudentModule(model, 300, 1 << 20)
    student.head.expect(Objective(Divergence("forward_kl"), hard_weight=1.0), None)
    trained_T = torch.arange(39)
    loss, _ = student(IDS, torch.arange(40).unsqueeze(0), trained_T, IDS[0, 1:].int())
    loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "model.norm.weight" in with_gradient
    assert not any(name.startswith(("lm_head", "model.embed_tokens")) for name in with_gradient)
    # B is zero, so that only its gradient is not.
    assert all(one.grad.abs().max() > 0 for name, one in model.named_parameters() if ".lora_B." in name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ["nothing"]}, r"targets: 'nothing' finds no linear layer of LlamaForCausalLM"),
        ({"targets": ["q_proj", "embed_tokens"]}, r"'embed_tokens' finds no linear layer"),
        (
            {"targets": ["lm_head"]},
            r"finds lm_head, the head, which takes no adapter; train it whole by student.lora.whole",
        ),
        ({"whole": ["nothing"]}, r"student.lora.whole: 'nothing' finds no parameter"),
    ],
)
def test_what_takes_no_adapter_is_refused(fields: dict, message: str):
    with pytest.raises(ModelError, match=message):
        adapted("llama", **fields)


def test_a_student_is_built_with_them(teacher_dir: Path):
    fields = {"layers": [0, 3], "lora": {"rank": 2, "whole": ["embed_tokens"]}, "freeze": ["layers.0"]}
    model = build_student(StudentSection.model_validate(fields), teacher_dir, torch.bfloat16)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert len(trained) == 1 + 7 * 2, "the embedding, and the adapters of the layer that is not frozen"
