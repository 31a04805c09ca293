import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kdscale.config import RunConfig
from kdscale.config.alignment import AlignmentSection
from kdscale.config.sections import StudentSection
from kdscale.data.pairs import TokenizerPair
from kdscale.data.tokenizer import load_tokenizer
from kdscale.engine.models import build_student
from kdscale.estimate import host_memory, read_model, student_parameters
from kdscale.show import show
from tests.conftest import PADDED_VOCAB, make_model, make_tokenizer
from tests.pairs import make_pair, make_vocabulary


def test_only_what_starts_here_needs_memory_here(teacher_dir: Path):
    fields = {
        "data": {"train": ["x"]},
        "teacher": {"model": str(teacher_dir), "dtype": "float32"},
        "student": {"layers": [0, 1], "dtype": "float32"},
    }
    config = RunConfig.model_validate(fields)
    both = host_memory(config, [config.teacher], student=True)
    teacher, student = host_memory(config, [config.teacher], student=False), host_memory(config, [], student=True)
    assert both is not None
    assert teacher is not None
    assert student is not None
    assert both == teacher + student
    assert min(teacher, student) > 0
    fields["teacher"]["replicas"] = 3
    three = host_memory(config, [RunConfig.model_validate(fields).teacher], student=False)
    assert three is not None
    # The file that is mapped while loading is counted once.
    assert teacher < three < 3 * teacher


def test_what_has_gpus_needs_no_memory_here(teacher_dir: Path):
    def needed(teacher_gpus: int, student_gpus: int, writer_gpus: int) -> int:
        fields = {
            "data": {"train": ["x"]},
            "teacher": {"model": str(teacher_dir), "gpus_per_rank": teacher_gpus},
            "student": {"layers": [0, 1], "gpus_per_rank": student_gpus},
            "on_policy": {"gpus_per_rank": writer_gpus},
        }
        config = RunConfig.model_validate(fields)
        found = host_memory(config, [config.teacher], student=True, rollouts=True)
        assert found is not None
        return found

    alone = [needed(0, 1, 1), needed(1, 0, 1), needed(1, 1, 0)]
    assert min(alone) > 0
    assert needed(0, 0, 0) == sum(alone)
    assert needed(1, 1, 1) == 0


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
    assert student_parameters(student, read_model(str(teacher_dir)), AlignmentSection()) == expected


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"freeze": ["embed_tokens"]}),
        ("qwen2", {"lora": {"rank": 2, "whole": ["lm_head"]}}),
        ("gpt2", {"freeze": ["wte"]}),
    ],
)
def test_a_student_is_counted_with_its_own_vocabulary(
    family: str, fields: dict[str, Any], tmp_path: Path, text_dir: Path
):
    teacher_dir = make_tokenizer(tmp_path / "teacher", every_byte=True)
    make_model(family).save_pretrained(teacher_dir)
    vocabulary = make_vocabulary(text_dir, tmp_path / "own.model")
    student, pair = StudentSection.model_validate({"layers": [1, 0], **fields}), make_pair(vocabulary, teacher_dir)
    built = list(build_student(student, teacher_dir, torch.float32, pair=pair).parameters())
    trained = [parameter for parameter in built if parameter.requires_grad]
    expected = tuple(sum(parameter.numel() for parameter in some) for some in (built, trained))
    files, alignment = read_model(str(teacher_dir)), AlignmentSection(method="gold", tokenizer=str(vocabulary))
    assert student_parameters(student, files, alignment) == expected
    assert student_parameters(student, files, AlignmentSection()) < expected, "the teacher's is smaller"
    missing = AlignmentSection(method="gold", tokenizer=str(tmp_path / "not-made-yet.model"))
    assert student_parameters(student, files, missing) == (None, None)

    # What `kdscale show` says, of a tokenizer in a directory.
    own = make_tokenizer(tmp_path / "own", vocab_size=310, every_byte=True)
    config = RunConfig.model_validate(
        {
            "data": {"train": ["x"]},
            "teacher": {"model": str(teacher_dir)},
            "student": {"layers": [1, 0], "dtype": "float32", **fields},
            "alignment": {"method": "gold", "tokenizer": str(own)},
        }
    )
    pair = TokenizerPair(load_tokenizer(str(own)), pair.teacher)
    built = list(build_student(student, teacher_dir, torch.float32, pair=pair).parameters())
    size = 4 * sum(parameter.numel() for parameter in built)
    with Console(width=200, file=io.StringIO()) as console:
        show(config, console)
    said = console.file.getvalue()
    assert re.search(rf"student: weights per rank +│ +{size / 1024:.1f} KiB", said), said


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_small_layer_stands_twice_in_memory_while_it_is_gathered(family: str, tmp_path: Path):
    """Under whatever name it is stored: GPT-2's files have no prefix in front of its layers."""
    model = make_model(family)
    model.base_model.save_pretrained(tmp_path)
    layers = model.base_model.get_submodule("h" if family == "gpt2" else "layers")
    expected = 2 * sum(parameter.numel() for parameter in layers[0].parameters())
    assert expected > PADDED_VOCAB * 32
    assert read_model(str(tmp_path)).largest_gathered == expected
