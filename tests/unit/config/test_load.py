import json
from pathlib import Path

import pytest

from kdscale.config import load_config
from kdscale.config.finetune import load_finetune
from kdscale.config.load import dump_resolved, load_resolved
from kdscale.errors import ConfigError

MINIMAL = """\
data:
  train: [text.jsonl]
teacher:
  model: some/teacher
student:
  layers: [0, 1]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_and_overrides(file: Path):
    config = load_config(file, ["train.lr=1e-2", "train.steps=7", "data.train=[a.txt, b.txt]", "run.name=x"])
    assert config.train.steps == 7
    assert config.train.lr == 1e-2
    assert config.data.train == ["a.txt", "b.txt"]
    assert config.loss.divergence == "forward_kl"


def test_resolved_config_round_trips(file: Path, tmp_path: Path):
    config = load_config(file, ["deepspeed.zero_optimization.stage=2"])
    dump_resolved(config, tmp_path / "out" / "config.yaml")
    assert load_resolved(tmp_path / "out" / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.divergense=jsd", r"unknown key loss.divergense; did you mean loss.divergence\?"),
        ("los.divergence=jsd", r"unknown key los; did you mean loss\?"),
        ("loss.beta=1", r"loss.beta: 1 must lie strictly between 0 and 1"),
        ("loss.beta=much", r"loss.beta = .much.: input should be a valid number"),
        ("loss.temperature={start: 1, end: 0}", r"loss.temperature: 0 must lie in \[0.05, 100\]"),
        ("train.betas=[0.9, 1.0]", r"train.betas.1 = 1.0: input should be less than 1"),
        ("student.freeze=['*embed']", r"'\*embed' must be a regular expression: nothing to repeat"),
        ("student.collective_seconds=500", r"give each other up before checkpoint.write_seconds = 600 is over"),
        (
            "teacher.load_seconds=3000",
            r"student.collective_seconds = 1800: .* before teacher.load_seconds = 3000 is over.*; raise it",
        ),
        ("loss.skew={start: 0.1, stop: 0.5}", r"unknown key loss.skew.stop; known: shape, start, end"),
        (
            "loss.divergence=logit_mse",
            r"cannot be had from targets.payload = topk, .* use targets.payload = hidden or dense",
        ),
        ("targets.encoding=int8", r"payload topk travels as float16 or uint8 or uint4"),
        ("train.steps=many", r"train.steps = 'many'"),
        ("checkpoint.every_steps=null", r"every_steps and checkpoint.every_seconds are both null; set one of them"),
        ("checkpoint.on_failure=ignore", r"checkpoint.on_failure = 'ignore': input should be 'continue' or 'stop'"),
        ("stream.network=10.0.0.5/8", r"stream.network: '10.0.0.5/8' must be a network in CIDR form, .* host bits set"),
        ("stream.tls=never", r"stream.tls = 'never': input should be 'auto' or 'always'"),
        ("run.name=../x", r"run.name: '../x' must match"),
        ("train.batch_rows=3 ", r"not of the form|train.batch_rows"),
        ("train.steps", r"not of the form section.key=value"),
        ("targets.payload=everything", r"targets.payload = 'everything'"),
        ("student.layers=null", r"student.layers is missing"),
        ("student.model=x", r"student.model is not read"),
        ("student.lora={targets: []}", r"student.lora.targets = \[\]: list should have at least 1 item"),
        ("student.lora={rang: 4}", r"unknown key student.lora.rang; did you mean student.lora.rank\?"),
        ("export.shard_gib=0", r"export.shard_gib = 0: input should be greater than 0"),
        ("deepspeed=nowhere.json", r"no such file beside the config"),
        ("train.warmup_steps=100", r"must be below train.steps"),
    ],
)
def test_bad_overrides_name_key_and_rule(file: Path, override: str, message: str):
    extra = ["train.micro_rows=2"] if "batch_rows" in override else []
    with pytest.raises(ConfigError, match=message):
        load_config(file, [override, *extra])


def test_unknown_key_names_its_line(file: Path):
    file.write_text(MINIMAL + "loss:\n  divergense: jsd\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:8: unknown key loss\.divergense; did you mean loss\.divergence"):
        load_config(file)


def test_key_set_twice_is_refused(file: Path):
    file.write_text(MINIMAL + "data:\n  train: [other.txt]\n")
    with pytest.raises(ConfigError, match="data is set twice"):
        load_config(file)


def test_pipeline_with_zero3_is_refused_by_name(file: Path, tmp_path: Path):
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match="pipeline = 2 needs ZeRO stage 0 or 1, the deepspeed section sets 3"):
        load_config(file, ["deepspeed=zero3.json", "student.parallel.pipeline=2"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"student.dtype = auto is or may become bfloat16; use configs/deepspeed/zero1.json, or set .* float32"),
        (["student.dtype=bfloat16", "train.clip=0"], r"cannot load its own bfloat16 checkpoints"),
        (["student.dtype=float32"], r"clips by a wrong gradient norm, and train.clip = 1; use .*zero1.json, or .*: 0"),
        (
            ["deepspeed={zero_optimization: {stage: 1}, pipeline: {use_reentrant: false}}"],
            r"deepspeed.pipeline = .* remove",
        ),
        (
            ["deepspeed={zero_optimization: {stage: 1}}", "student.lora={rank: 4}"],
            r"pipeline = 2 with student.lora is not supported; use student.parallel.data, with any ZeRO stage",
        ),
    ],
)
def test_what_pipelines_cannot_do_is_refused(file: Path, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(file, ["student.parallel.pipeline=2", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ["deepspeed={zero_optimization: {stage: 1}}"],
        ["student.dtype=float32", "train.clip=0"],
        ["deepspeed={bf16: {enabled: false}}", "train.clip=0"],
    ],
)
def test_pipelines_that_work_are_accepted(file: Path, overrides: list[str]):
    assert load_config(file, ["student.parallel.pipeline=2", *overrides]).student.parallel.pipeline == 2


def test_deepspeed_file_lies_beside_the_config(file: Path, tmp_path: Path):
    (tmp_path / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert load_config(file, ["deepspeed=zero2.json"]).zero_stage == 2


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "data: [\n", "train: {steps: 3}\n"])
def test_unusable_files_are_refused(file: Path, text: str):
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(file)


def test_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(Path("configs").rglob("*.yaml")), ids=str)
def test_shipped_configs_load(path: Path):
    about_teachers = "\nteacher:" in path.read_text()
    assert (load_config if about_teachers else load_finetune)(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.parallel.pipeline=2", "deepspeed.zero_optimization.stage=1"], "cannot be cut into stages"),
        (["data.packing=joined"], "data.packing = joined: .* does not read it"),
        (["data.append_eos=false"], "data.append_eos = False: .* does not read it"),
        (["data.tokenizer=some/tokenizer"], "images have none"),
    ],
)
def test_what_a_classifier_does_not_have_is_refused(overrides: list[str], message: str, file: Path):
    assert load_config(file, ["task=image-classification"]).task == "image-classification"
    with pytest.raises(ConfigError, match=message):
        load_config(file, ["task=image-classification", *overrides])
    load_config(file, overrides)
