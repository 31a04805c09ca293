from pathlib import Path

import pytest

from kdscale.config import load_config
from kdscale.errors import ConfigError
from kdscale.identity import settings

TEXT = """\
data: {train: [text.jsonl]}
teacher: {model: some/teacher}
student: {layers: [0, 1]}
alignment: {method: gold, tokenizer: own.model}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["alignment.method=null"],
            "alignment.tokenizer is not read without alignment.method; set that to gold or uld",
        ),
        (["alignment={unmatched_weight: 1}"], "alignment.unmatched_weight is not read without alignment.method"),
        (["alignment.tokenizer=null"], "alignment.method = gold: alignment.tokenizer is missing"),
        (["alignment.method=best"], "alignment.method = 'best': input should be 'gold' or 'uld'"),
        (["alignment.unmatched_weight=-1"], "input should be greater than or equal to 0"),
        (["task=sequence-classification"], "aligns text token by token, and task = sequence-classification"),
        (
            ["targets.payload=sampled"],
            "cannot be had from targets.payload = sampled: .*; use targets.payload = topk or hidden or dense",
        ),
        (["loss.temperature=2"], "loss.temperature goes from 2 to 2; set loss.temperature: 1"),
        (
            ["loss.divergence=adaptive_kl", "targets.payload=hidden"],
            "needs a sum over outcomes; use loss.divergence = forward_kl, reverse_kl",
        ),
        (["alignment.method=uld", "loss.divergence=jsd"], "does not read loss.divergence = jsd"),
        (
            ["student.parallel.pipeline=2", "deepspeed.zero_optimization.stage=1"],
            "alignment.method = gold with student.parallel.pipeline = 2 is not supported; use student.parallel.data",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_load(file: Path, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(file, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["alignment.method=uld", "targets.payload=dense"],
        ["loss.divergence=jsd", "targets.payload=hidden", "alignment.unmatched_weight=0"],
        # Labels alone need no payload.
        ["loss.hard_weight=1", "targets.payload=sampled", "loss.temperature=1"],
    ],
    ids=str,
)
def test_what_works_is_taken(file: Path, overrides: list[str]):
    assert load_config(file, overrides).alignment.method is not None


def test_the_method_is_part_of_what_a_run_means_and_the_path_is_not(file: Path):
    here = settings(load_config(file))
    assert here["alignment.method"] == "gold"
    assert settings(load_config(file, ["alignment.tokenizer=moved/own.model"])) == here
    assert settings(load_config(file, ["alignment.unmatched_weight=1"])) != here
    assert not [name for name in settings(load_config(file, ["alignment={}"])) if name.startswith("alignment")]
