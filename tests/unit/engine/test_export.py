"""An exported student on disk."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdscale.engine.export import require_replaceable, whole_state, write_model
from kdscale.errors import ConfigError
from tests.conftest import make_model


def test_large_students_are_written_in_several_files(tmp_path: Path):
    model, out = make_model("llama"), tmp_path / "student"
    state = whole_state(model, 0)
    saved: list[Path] = []
    write_model(model, copy.copy(state), out, saved.append, 5 << 30)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    write_model(model, copy.copy(state), out, saved.append, 60 << 10)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size <= 64 << 10 for path in files)
    assert (out / "model.safetensors.index.json").is_file()
    assert not (out / "model.safetensors").exists(), "nothing of what stood there before"
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert len(saved) == 2
    assert list(tmp_path.iterdir()) == [out]


def test_an_export_replaces_its_like_alone(tmp_path: Path):
    model, out = make_model("llama"), tmp_path / "student"
    require_replaceable(out, "hf")
    out.mkdir()
    require_replaceable(out, "hf")
    write_model(model, whole_state(model, 0), out, lambda directory: None, 5 << 30)
    require_replaceable(out, "hf")
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "trained-on")
    for form, other in (("int8", out), ("gguf", out), ("hf", tmp_path / "trained-on"), ("hf", out / "config.json")):
        with pytest.raises(ConfigError, match=rf"--out {other} exists and is no .*; name another one, or move it away"):
            require_replaceable(other, form)


def test_a_gguf_file_replaces_gguf_files(tmp_path: Path):
    require_replaceable(tmp_path / "x.gguf", "gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0")
    require_replaceable(tmp_path / "x.gguf", "gguf")
    (tmp_path / "y.gguf").write_bytes(b"something else")
    (tmp_path / "empty").mkdir()
    for other in ("y.gguf", "empty"):
        with pytest.raises(ConfigError, match=rf"{other} exists and is no GGUF file"):
            require_replaceable(tmp_path / other, "gguf")
