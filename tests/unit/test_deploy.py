"""A model as a GGUF file and in int8: measured, and kept only when it is the model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdscale import deploy
from kdscale.compare import text_rows
from kdscale.config.hardware import cpu_sums_int8
from kdscale.deploy import export_gguf, export_int8, to_gguf, to_int8
from kdscale.errors import ConfigError, ModelError
from tests.conftest import documents, make_model, make_tokenizer, needs_int8


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = make_tokenizer(tmp_path / "small", every_byte=True)
    make_model("llama").save_pretrained(directory)
    return directory


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("\n".join(documents(5)))
    return [str(tmp_path / "text.txt")]


def test_as_it_is_nothing_is_lost(model_dir: Path):
    report = to_gguf(model_dir, "auto", None, None, None)
    assert (report.type, report.file) == ("f32", str(model_dir.with_name("small-f32.gguf")))
    assert Path(report.file).stat().st_size == report.bytes
    assert report.max_logit_difference < 1e-5
    assert abs(report.kl) < 1e-6
    assert report.top1_agreement == 1
    assert json.loads(Path(f"{report.file}.json").read_text())["num_tokens"] == report.num_tokens > 50


def test_rounding_is_measured(model_dir: Path, text: list[str]):
    out = model_dir.parent / "deep" / "model.gguf"
    report = to_gguf(model_dir, "auto", out, "q8_0", text)
    assert 0 < report.kl < 0.01
    assert 0.9 < report.top1_agreement <= 1
    assert report.perplexity == pytest.approx(report.perplexity_before, rel=0.02)
    assert report.bytes < 0.5 * report.bytes_before
    assert sorted(path.name for path in out.parent.iterdir()) == ["model.gguf", "model.gguf.json"]
    with pytest.raises(ConfigError, match=r"--type f16 rounds the weights; name text .* --text FILE"):
        to_gguf(model_dir, "auto", out, "f16", None)


def break_model(directory: Path) -> None:
    """One large element in each row, and so in each of its blocks of 32, leaves nothing of the others."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.self_attn.v_proj):
                matrix.weight[:, 0] = 4000 * matrix.weight.abs().max()
        # What meets them is nothing.
        model.model.embed_tokens.weight[:, 0] = 0
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[0] = layer.post_attention_layernorm.weight.data[0] = 0
    model.save_pretrained(directory)


def test_what_is_no_longer_the_model_is_not_kept(model_dir: Path, text: list[str]):
    break_model(model_dir)
    out = model_dir.parent / "model.gguf"
    before = set(model_dir.parent.iterdir())
    lost = r"likeliest token is the model's in 0\.\d+ of \d+ positions .* nothing was kept"
    with pytest.raises(ModelError, match=rf"{lost}\. Use --type f16 or bf16"):
        export_gguf(model_dir, out, "q8_0", text_rows(text, model_dir))
    if cpu_sums_int8():
        with pytest.raises(ModelError, match=rf"{lost}\. Keep it as it is"):
            to_int8(model_dir, "auto", None, text)
    assert set(model_dir.parent.iterdir()) == before
    assert to_gguf(model_dir, "auto", out, None, text).top1_agreement == 1


def test_int8_needs_a_processor_that_adds_it_up(model_dir: Path, text: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deploy, "cpu_sums_int8", lambda: False)
    with pytest.raises(ConfigError, match=r"which has no VNNI, .* use --format gguf --type q8_0"):
        to_int8(model_dir, "auto", None, text)
    assert {path.name for path in model_dir.parent.iterdir()} == {"small", "text.txt"}


@needs_int8
def test_int8_is_measured(model_dir: Path, text: list[str]):
    report = to_int8(model_dir, "auto", None, text)
    out = model_dir.with_name("small-int8")
    assert (report.type, report.file) == ("int8", str(out))
    assert 0 < report.kl < 0.01
    assert 0.9 < report.top1_agreement < 1.01
    assert report.perplexity == pytest.approx(report.perplexity_before, rel=0.02)
    assert report.bytes == (out / "model.safetensors").stat().st_size < 0.8 * report.bytes_before
    assert report.tokens_per_second is not None
    assert report.tokens_per_second > 0
    assert f"as int8 ({report.bytes_before / 2**20:.0f} before)" in report.line()
    assert f"forward {report.tokens_per_second:.0f} tokens/s" in report.line()
    written = json.loads(out.with_name("small-int8.json").read_text())
    assert (written["kl"], written["num_tokens"]) == (report.kl, report.num_tokens)
    assert {path.name for path in model_dir.parent.iterdir()} == {"small", "small-int8", "small-int8.json", "text.txt"}
    # An export may replace an earlier one, and is no model to export from.
    assert export_int8(model_dir, out, text_rows(text, model_dir), 5 << 30).kl == report.kl
    for again in (to_int8, lambda *args: to_gguf(*args[:3], None, args[3])):
        with pytest.raises(ModelError, match=r"small-int8 is quantised already \(quant_method = torchao\).* made of"):
            again(out, "auto", None, text)


def test_int8_needs_text_and_a_place(model_dir: Path, text: list[str]):
    with pytest.raises(ConfigError, match=r"--format int8 rounds the weights; name text .* --text FILE"):
        to_int8(model_dir, "auto", None, None)
    other = model_dir.with_name("other")
    make_model("llama", seed=1).save_pretrained(other)
    for taken in (model_dir, model_dir.parent, Path(text[0]), other):
        with pytest.raises(ConfigError, match=r"exists and is no int8 export of kdscale; name another one"):
            to_int8(model_dir, "auto", taken, text)
    assert {path.name for path in model_dir.parent.iterdir()} == {"small", "other", "text.txt"}


def test_classifiers_are_refused(model_dir: Path, text: list[str]):
    fields = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(fields | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(ModelError, match=r"holds a LlamaForSequenceClassification, and only causal language models"):
        to_int8(model_dir, "auto", None, text)


def test_a_report_replaces_reports_alone(model_dir: Path):
    out = model_dir.with_name("small.gguf")
    beside = out.with_name("small.gguf.json")
    to_gguf(model_dir, "auto", out, None, None)
    assert json.loads(beside.read_text())["file"] == str(out)
    to_gguf(model_dir, "auto", out, None, None)
    for other in ("[1, 2]", '{"file": "of another program"}', "no JSON"):
        beside.write_text(other)
        with pytest.raises(ConfigError, match=rf"--out {out}: its report would replace {beside}, which is none"):
            to_gguf(model_dir, "auto", out, None, None)
        assert beside.read_text() == other
