"""What does not go with on-policy distillation."""

from typing import Any

import pytest
from pydantic import ValidationError

from kdscale.config.on_policy import require_none
from kdscale.config.schema import RunConfig
from kdscale.errors import ConfigError
from kdscale.identity import kind_of, settings


def config(on_policy: dict[str, Any] | None, **sections: Any) -> RunConfig:
    fields: dict[str, Any] = {"data": {"train": ["x"]}, "teacher": {"model": "t"}, "student": {"layers": [0]}}
    return RunConfig.model_validate(fields | sections | {"on_policy": on_policy})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": "sequence-classification"}, "only language models write"),
        ({"targets": {"source": "recording", "recording": "r"}}, "in no recording, and needs a teacher"),
        ({"targets": {"source": "live+record", "recording": "r"}}, "use targets.source: live"),
        (
            {"targets": {"source": "none"}, "loss": {"hard_weight": 1}},
            "targets.source = none does not go with on_policy",
        ),
        ({"loss": {"hard_weight": 1}}, "no true labels; lower it"),
        ({"data": {"train": ["x"], "row_tokens": 96}}, "below the 97 tokens"),
        (
            {"student": {"layers": [0], "parallel": {"pipeline": 2}}, "deepspeed": {"zero_optimization": {"stage": 1}}},
            "use student.parallel.pipeline: 1 with data ranks",
        ),
    ],
)
def test_refused(sections: dict[str, Any], message: str):
    config(None, **sections)
    with pytest.raises(ValidationError, match=message):
        config({}, **sections)


def test_it_is_part_of_what_a_run_means_where_it_is_there():
    assert not [name for name in settings(config(None)) if name.startswith("on_policy")]
    named = settings(config({"fraction": 0.25}))
    assert named["on_policy.fraction"] == 0.25
    assert "on_policy.ranks" not in named
    assert kind_of("on_policy.refresh_steps") == "meaning"
    assert kind_of("on_policy.cpus_per_rank") == "rounding"


def test_the_launcher_starts_nobody_who_writes():
    require_none(None)
    with pytest.raises(ConfigError, match="use `kdscale train`"):
        require_none(config({}).on_policy)
