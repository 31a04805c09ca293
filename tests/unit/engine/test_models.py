"""Model directories from outside are data: nothing in them is run, and nothing outside them is read."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kdscale.engine.directories import load_config, resolve_model
from kdscale.engine.models import from_teacher_layers, load_causal_lm
from kdscale.errors import ModelError
from tests.conftest import FAMILIES, PADDED_VOCAB, make_model


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


SIZES: dict[str, Any] = {
    "vocab_size": PADDED_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "no_rope_layer_interval": 2,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("smollm3", transformers.SmolLM3Config(**SIZES)),
        # All of its layers stand in a list of numbers, too.
        (
            "llama4_text",
            transformers.Llama4TextConfig(**SIZES, head_dim=8, intermediate_size_mlp=64, num_local_experts=2),
        ),
    ],
)
def test_chosen_layers_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, config: transformers.PretrainedConfig
):
    """Every second layer of these families is told no positions, by a list in the config."""
    monkeypatch.setitem(FAMILIES, family, config)
    teacher = make_model(family)
    assert teacher.config.no_rope_layers == [1, 0, 1, 0]
    teacher.save_pretrained(tmp_path)
    student = from_teacher_layers(tmp_path, [1, 2], torch.float32).eval()
    assert student.config.no_rope_layers == [0, 1]
    teacher.model.layers = torch.nn.ModuleList(teacher.model.layers[layer] for layer in (1, 2))
    teacher.config.num_hidden_layers = 2
    ids = torch.arange(24).unsqueeze(0) * 7 % 300
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids).logits, teacher(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", "four", "config.json is not usable|cannot be loaded"),
        ("hidden_act", 7, "config.json is not usable|cannot be loaded"),
        ("intermediate_size", 48, "other sizes than"),
    ],
)
@pytest.mark.parametrize("load", [load_causal_lm, lambda *given: from_teacher_layers(given[0], [0], given[1])])
def test_a_config_that_does_not_fit_is_named(tmp_path: Path, load: Any, field: str, value: Any, message: str):
    make_model("llama").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(ModelError, match=message):
        load(tmp_path, torch.float32)
