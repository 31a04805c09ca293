"""Model directories from outside are data: nothing in them is run, and nothing outside them is read."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.engine.directories import load_config, resolve_model
from kdscale.engine.models import from_teacher_layers, load_causal_lm
from kdscale.errors import ModelError
from tests.conftest import make_model


class Planted:
    """Makes the directory ``ran`` when it is unpickled."""

    def __init__(self, directory: Path) -> None:
        self._ran = str(directory / "ran")

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._ran,)


def test_pickled_weights_are_refused_unread(tmp_path: Path):
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(tmp_path)))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin may be pickles, .*; convert its weights to safetensors"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="convert its weights to safetensors"):
        from_teacher_layers(tmp_path, [0], torch.float32)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_causal_lm(tmp_path, torch.float32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("model_type", ["llama", "unheard-of"])
def test_code_beside_a_model_is_not_run(tmp_path: Path, model_type: str):
    """Of a family that transformers knows it takes its own code; another one is refused."""
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Own: pass\n")
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": model_type}
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if model_type == "llama":
        assert type(load_causal_lm(resolve_model(str(tmp_path)), torch.float32)).__module__.startswith("transformers.")
    else:
        with pytest.raises(ModelError, match="is not usable"):
            load_config(tmp_path)
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_causal_lm(tmp_path, torch.float32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/tmp/elsewhere.safetensors", "sub/x.safetensors", "x.bin"]
)
def test_an_index_names_files_of_its_directory(tmp_path: Path, name: str):
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ModelError, match=f"names '{name}'; weights must be safetensors files in"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="weights must be"):
        from_teacher_layers(tmp_path, [0], torch.float32)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}'])
def test_a_broken_index_is_named(tmp_path: Path, content: str):
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json is no index of safetensors files"):
        resolve_model(str(tmp_path))
