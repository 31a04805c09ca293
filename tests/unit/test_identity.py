"""What may differ when a run goes on from a checkpoint."""

from typing import Any

import pytest

from kdscale.config.schema import RunConfig
from kdscale.errors import CheckpointError, ConfigError
from kdscale.identity import _KINDS, Change, changes, kind_of, names, require_known, require_resumable, settings

BASE: dict[str, dict[str, Any]] = {
    "data": {"train": ["x"]},
    "teacher": {"model": "t"},
    "student": {"layers": [0]},
    "train": {"batch_rows": 8, "steps": 10, "schedule": "constant"},
    "deepspeed": {"zero_optimization": {"stage": 1}},
}


def config(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in BASE | sections}
    )


def changed(**sections: dict[str, Any]) -> list[Change]:
    return changes(settings(config()), settings(config(**sections)))


def go_on(found: list[Change], *, deterministic: bool = False, allowed: tuple[str, ...] = ()) -> list[Change]:
    return require_resumable("step-5", found, deterministic=deterministic, allowed=allowed)


def test_every_setting_has_a_kind():
    """A setting added to a section whose settings differ in kind must be put in its place."""
    known = {*names(config()), *names(config(on_policy={}))}
    sections = {name.rsplit(".", n)[0] for name in known for n in range(3)}
    assert {name for name in known if not any(f"{name}.".startswith(f"{one}.") for one in _KINDS)} == set()
    assert {name for name in _KINDS if name not in sections and not name.startswith("deepspeed.")} == {
        *("student.files", "tokenizer", "student_tokenizer", "corpus", "environment"),
        *("loss.layers.pairs", "loss.layers.projection"),
    }


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"name": "other"}},
        {"run": {"dir": "elsewhere"}},
        {"data": {"train": ["moved/x"]}},
        {"stream": {"in_flight": 2, "stall_seconds": 5}},
        {"checkpoint": {"every_steps": 3}},
        {"cluster": {"grace_seconds": 3}},
        {"evaluate": {"canary_rows": 0}},
        {"student": {"start_seconds": 5}},
        {"train": {"steps": 20}},
        {"targets": {"sampler": "threshold"}},
    ],
    ids=str,
)
def test_what_changes_no_number_is_free(sections: dict[str, dict[str, Any]]):
    assert changed(**sections) == []


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"run": {"seed": 1}}, "run.seed"),
        ({"data": {"row_tokens": 64}}, "data.row_tokens"),
        ({"data": {"packing": "joined"}}, "data.packing"),
        ({"loss": {"temperature": 2.0}}, "loss.temperature"),
        ({"loss": {"temperature": {"shape": "linear", "start": 2.0, "end": 1.0}}}, "loss.temperature"),
        ({"targets": {"k": 8}}, "targets.k"),
        ({"train": {"batch_rows": 4}}, "train.batch_rows"),
        ({"train": {"lr": 1.0}}, "train.lr"),
        ({"train": {"betas": [0.9, 0.99]}}, "train.betas"),
        ({"teacher": {"dtype": "float32"}}, "teacher.dtype"),
        ({"deepspeed": {"communication_data_type": "fp32"}}, "deepspeed.communication_data_type"),
    ],
    ids=str,
)
def test_another_meaning_is_refused_unless_it_is_named(sections: dict[str, dict[str, Any]], name: str):
    found = changed(**sections)
    assert name in {change.name for change in found}
    with pytest.raises(
        CheckpointError, match=rf"step-5 belongs to a run .*\n  .*{name}: checkpoint .*, now .*\n.*--allow"
    ) as e:
        go_on([change for change in found if change.name == name])
    assert f"--allow-changed {name}" in str(e.value)
    allowed = tuple(change.name for change in found)
    assert go_on(found, allowed=allowed, deterministic=True) == found
    assert go_on(found, allowed=tuple({one.split(".")[0] for one in allowed})) == found


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"train": {"micro_rows": 2}}, "train.micro_rows"),
        ({"student": {"parallel": {"data": 2}}}, "student.parallel.data"),
        ({"student": {"cpus_per_rank": 2}}, "student.cpus_per_rank"),
        ({"loss": {"chunk_mib": 1.0}}, "loss.chunk_mib"),
        ({"teacher": {"ranks": 2}}, "teacher.ranks"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "deepspeed.zero_optimization.stage"),
    ],
    ids=str,
)
def test_rounding_counts_in_deterministic_mode_only(sections: dict[str, dict[str, Any]], name: str):
    found = changed(**sections)
    assert [(change.name, change.kind) for change in found] == [(name, "rounding")]
    assert go_on(found) == found
    with pytest.raises(CheckpointError, match=r"run.deterministic = true: what changes rounding counts too"):
        go_on(found, deterministic=True)
    assert go_on(found, deterministic=True, allowed=(name,)) == found


@pytest.mark.parametrize("fields", [{"layers": [0, 1]}, {"lora": {}}], ids=str)
def test_another_student_cannot_be_allowed(fields: dict[str, Any]):
    found = changed(student=fields)
    with pytest.raises(CheckpointError, match="holds other parameters than this student's") as refusal:
        go_on(found, allowed=("student", "student.layers"))
    assert "--allow-changed" not in str(refusal.value)


def test_another_tokenizer_makes_another_student():
    found = changes({"student_tokenizer": "a"}, {"student_tokenizer": "b"})
    with pytest.raises(
        CheckpointError, match=r"student_tokenizer \(the content of alignment.tokenizer\): checkpoint 'a', now 'b'"
    ):
        go_on(found, allowed=("student_tokenizer",))


def test_adapters_that_are_not_there_have_no_settings():
    """A checkpoint from before there were adapters is one of a student without."""
    assert "student.lora" not in settings(config())
    assert settings(config(student={"lora": {"rank": 4}}))["student.lora.rank"] == 4


def test_steps_are_part_of_a_schedule():
    """At a constant rate a longer run begins with the same steps; under a schedule it does not."""
    cosine = {"schedule": "cosine"}
    found = changes(settings(config(train=cosine)), settings(config(train=cosine | {"steps": 20})))
    assert [change.name for change in found] == ["train.steps"]
    ramp = {"hard_weight": {"shape": "linear", "start": 0.0, "end": 1.0}}
    found = changes(settings(config(loss=ramp)), settings(config(loss=ramp, train={"steps": 20})))
    assert [change.name for change in found] == ["train.steps"]


def test_targets_do_not_count_for_labels_alone():
    labels = {"hard_weight": 1.0}
    assert changes(settings(config(loss=labels)), settings(config(loss=labels, targets={"k": 8}))) == []


def test_names_that_are_no_settings_are_refused():
    known = [*settings(config()), "corpus", "environment.torch"]
    require_known(["loss", "loss.temperature", "corpus", "environment", "student.parallel"], known)
    with pytest.raises(ConfigError, match=r"allow_changed = loss.temprature: .*did you mean loss.temperature\?"):
        require_known(["loss.temprature"], known)


def test_unlisted_settings_count():
    assert kind_of("something.new") == "meaning"


def test_each_of_several_teachers_counts_like_the_only_one():
    """Where its files lie is free, what it computes in has a meaning, ranks round; a run of one teacher knows nothing of it."""
    assert not [name for name in settings(config()) if name.startswith("teachers.") or name == "data.teacher_column"]

    def several(code: dict[str, Any], **teachers: Any) -> RunConfig:
        others = {"others": {"code": {"model": "c"} | code}}
        return config(data={"teacher_column": "of"}, teachers=others | teachers)

    def kinds(code: dict[str, Any], **teachers: Any) -> dict[str, str]:
        found = changes(settings(several({})), settings(several(code, **teachers)))
        return {change.name: change.kind for change in found}

    assert kinds({"model": "moved", "restarts": 1}) == {}
    assert kinds({"ranks": 2}) == {"teachers.others.code.ranks": "rounding"}
    assert kinds({"dtype": "float32"}) == {"teachers.others.code.dtype": "meaning"}
    assert kinds({}, main="general") == {"teachers.main": "meaning"}
    digests = changes({"teachers.others.code": "a"}, {"teachers.others.code": "b"})
    with pytest.raises(
        CheckpointError, match=r"teachers.others.code \(the files of teachers.others.code.model\): .*'a'"
    ):
        go_on(digests)
