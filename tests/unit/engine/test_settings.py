from pathlib import Path

import pytest
from pydantic import ValidationError

from kdscale.config.schema import RunConfig
from kdscale.engine.scale import backward_factor
from kdscale.engine.settings import check_settings, student_dtype, student_settings, teacher_settings
from kdscale.errors import ConfigError


def config(**deepspeed) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"train": ["x"]},
            "teacher": {"model": "t"},
            "student": {"layers": [0], "parallel": {"data": 2}},
            "train": {"batch_rows": 12, "micro_rows": 3, "clip": 0.5},
            "deepspeed": deepspeed,
        }
    )


def test_batch_sizes_are_filled_in():
    settings = student_settings(config(zero_optimization={"stage": 2}), "bfloat16")
    assert settings["train_batch_size"] == 12
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"] == {"enabled": True}
    assert settings["zero_optimization"] == {"stage": 2}


def test_what_agrees_or_is_left_open_is_accepted():
    student_settings(config(train_batch_size=12, gradient_accumulation_steps="auto"), "float32")


@pytest.mark.parametrize(
    ("deepspeed", "message"),
    [
        ({"train_batch_size": 16}, r"deepspeed.train_batch_size = 16 contradicts train.batch_rows.*12"),
        ({"gradient_clipping": 1.0}, r"contradicts train.clip"),
        ({"optimizer": {"type": "Lion"}}, r"contradicts train.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, r"use train.schedule"),
        ({"fp16": {"enabled": True}}, r"use student.dtype: bfloat16"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer.device = nvme .* use cpu",
        ),
    ],
)
def test_contradictions_are_refused_by_name(deepspeed: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        student_settings(config(**deepspeed), "float32")


def test_dtype_follows_the_deepspeed_file_where_it_is_left_open():
    assert student_dtype(config(bf16={"enabled": True})) == "bfloat16"
    assert student_dtype(config(bf16={"enabled": False})) == "float32"
    assert student_dtype(config(bf16={"enabled": "auto"})) == student_dtype(config()) == "auto"
    assert student_dtype(config(bf16="auto")) == "auto"
    check_settings(config(bf16={"enabled": True}))


def test_what_changes_nothing_is_no_contradiction():
    for given in ({"bf16": {"enabled": "auto"}}, {"bf16": "auto"}, {"fp16": {"enabled": False}}):
        assert student_settings(config(**given), "bfloat16")["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("deepspeed", "message"),
    [
        ({"zero_optimization": 2}, "zero_optimization = 2 must be a mapping"),
        ({"zero_optimization": None}, "zero_optimization = None must be a mapping"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer = 'cpu' must be"),
        ({"bf16": True}, "bf16 = True must be a mapping"),
    ],
)
def test_what_is_no_mapping_is_refused(deepspeed: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        config(**deepspeed)


def test_teacher_is_sharded_only_over_several_ranks():
    assert teacher_settings(1, "float32")["zero_optimization"]["stage"] == 0
    assert teacher_settings(2, "float32")["zero_optimization"]["stage"] == 3


def test_true_mean_of_unequal_rows():
    """Six tokens with losses 3,1,1,1 | 5,5: the mean is 2.667, the mean of the means 3.25."""
    sums, tokens = (6.0, 10.0), 6
    for micro_steps, data_ranks in ((1, 1), (2, 1), (1, 2)):
        pieces = [sum(sums)] if micro_steps * data_ranks == 1 else list(sums)
        factor = backward_factor(tokens, micro_steps, data_ranks)
        # DeepSpeed divides by the micro-steps and averages over the ranks.
        seen = sum(piece * factor / micro_steps / data_ranks for piece in pieces)
        assert seen == pytest.approx(16 / 6)
    assert backward_factor(0, 2, 2) == 0.0


@pytest.mark.parametrize("path", sorted(Path("configs/deepspeed").glob("*.json")), ids=str)
def test_shipped_deepspeed_files_agree_with_kdscale(path: Path):
    import json

    fields = json.loads(path.read_text())
    assert student_settings(config(**fields), "float32")["zero_optimization"]["stage"] == int(path.stem[-1])
