"""An exported student on disk."""

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kdscale.engine.export import whole_state, write_model
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
