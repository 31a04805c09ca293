"""A model as a GGUF file: measured, and kept only when it is the model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdscale.deploy import export_gguf, text_rows, to_gguf
from kdscale.errors import ConfigError, ModelError
from tests.conftest import documents, make_model, make_tokenizer


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


def test_what_is_no_longer_the_model_is_not_kept(model_dir: Path, text: list[str]):
    """One large element in each block of 32 leaves nothing of the others."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.self_attn.v_proj):
                matrix.weight[:, 0] = 4000 * matrix.weight.abs().max()
        # What meets them is nothing.
        model.model.embed_tokens.weight[:, 0] = 0
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[0] = layer.post_attention_layernorm.weight.data[0] = 0
    model.save_pretrained(model_dir)
    out = model_dir.parent / "model.gguf"
    before = set(model_dir.parent.iterdir())
    with pytest.raises(
        ModelError, match=r"likeliest token is the model's in 0\.\d+ of \d+ positions .* nothing was kept"
    ):
        export_gguf(model_dir, out, "q8_0", text_rows(text, model_dir))
    assert set(model_dir.parent.iterdir()) == before
    assert to_gguf(model_dir, "auto", out, None, text).top1_agreement == 1
