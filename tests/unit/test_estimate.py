from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.config import RunConfig
from kdscale.config.sections import StudentSection
from kdscale.engine.models import build_student
from kdscale.estimate import host_memory, read_model, student_parameters
from tests.conftest import PADDED_VOCAB, make_model


def test_only_what_starts_here_needs_memory_here(teacher_dir: Path):
    fields = {
        "data": {"train": ["x"]},
        "teacher": {"model": str(teacher_dir), "dtype": "float32"},
        "student": {"layers": [0, 1], "dtype": "float32"},
    }
    config = RunConfig.model_validate(fields)
    both = host_memory(config, teacher=True, student=True)
    teacher, student = (host_memory(config, teacher=one, student=not one) for one in (True, False))
    assert both is not None
    assert teacher is not None
    assert student is not None
    assert both == teacher + student
    assert min(teacher, student) > 0
    fields["teacher"]["replicas"] = 3
    three = host_memory(RunConfig.model_validate(fields), teacher=True, student=False)
    assert three is not None
    # The file that is mapped while loading is counted once.
    assert teacher < three < 3 * teacher


@pytest.mark.parametrize(
    "fields",
    [
        {"freeze": ["embed_tokens"]},
        {"lora": {"rank": 2}},
        {"lora": {"rank": 3, "targets": ["q_proj", "mlp"], "whole": ["embed_tokens", "norm"]}, "freeze": ["layernorm"]},
    ],
    ids=str,
)
def test_parameters_are_those_of_the_student_that_is_built(fields: dict[str, Any], teacher_dir: Path):
    student = StudentSection.model_validate({"layers": [0, 3, 3], **fields})
    built = list(build_student(student, teacher_dir, torch.float32).parameters())
    trained = [parameter for parameter in built if parameter.requires_grad]
    expected = tuple(sum(parameter.numel() for parameter in some) for some in (built, trained))
    assert student_parameters(student, read_model(str(teacher_dir))) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_small_layer_stands_twice_in_memory_while_it_is_gathered(family: str, tmp_path: Path):
    """Under whatever name it is stored: GPT-2's files have no prefix in front of its layers."""
    model = make_model(family)
    model.base_model.save_pretrained(tmp_path)
    layers = model.base_model.get_submodule("h" if family == "gpt2" else "layers")
    expected = 2 * sum(parameter.numel() for parameter in layers[0].parameters())
    assert expected > PADDED_VOCAB * 32
    assert read_model(str(tmp_path)).largest_gathered == expected
