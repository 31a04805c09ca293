"""int8 models: what is written is int8 but for embedding and head, holds no pickle, and is the model when it is read again."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from kdscale.config.sections import StudentSection
from kdscale.engine import int8_model
from kdscale.engine.int8_model import load_int8, require_int8, write_int8
from kdscale.engine.models import build_student
from kdscale.errors import ConfigError, ModelError
from tests.conftest import FAMILIES, make_model, make_tokenizer, needs_int8

IDS = torch.arange(40).unsqueeze(0) * 7 % 300


def stored(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    return found


@needs_int8
@pytest.mark.parametrize("family", sorted(int8_model._FAMILIES))
@torch.no_grad()
def test_what_is_read_again_is_the_model_rounded(family: str, tmp_path: Path):
    model = make_model(family)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_()
    model.save_pretrained(tmp_path / "model")
    write_int8(tmp_path / "model", tmp_path / "int8", 5 << 30)
    tensors = stored(tmp_path / "int8")
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            rows, scale = tensors[f"{name}._weight_qdata"], tensors[f"{name}._weight_scale"]
            assert rows.dtype == torch.int8
            assert scale.shape == (len(module.weight), 1), "a scale for each output channel"
            # The largest weight of a row is the largest number; the others are off by half a step at most.
            assert (rows.short().abs().amax(1) >= 127).all()
            assert ((rows * scale - module.weight).abs() <= 0.501 * scale + 1e-7).all()
            if module.bias is not None:
                assert torch.equal(tensors[f"{name}.bias"], module.bias)
    read = load_int8(tmp_path / "int8", torch.float32)
    kept = {name: one for name, one in read.named_parameters() if not hasattr(one, "qdata")}
    named = dict(model.named_parameters())
    assert all(torch.equal(one, named[name]) for name, one in kept.items())
    assert {name for name, one in named.items() if one is head.weight} <= kept.keys()
    ours, theirs = read(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert 0 < (ours - theirs).abs().max() < 0.1 * theirs.abs().max()
    # Nothing depends on which text comes beside it: activations have a scale for each token.
    both = read(input_ids=torch.cat([IDS, (IDS + 5) % 300])).logits
    torch.testing.assert_close(both[:1], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_stays_as_it_is(tied: bool, tmp_path: Path):
    model = make_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    write_int8(tmp_path / "model", tmp_path / "int8", 5 << 30)
    assert ("lm_head.weight" in stored(tmp_path / "int8")) is not tied
    read = load_int8(tmp_path / "int8", torch.float32)
    assert torch.equal(read.lm_head.weight, model.lm_head.weight)
    assert (read.lm_head.weight is read.model.embed_tokens.weight) is tied


def test_the_directory_is_whole_and_holds_no_pickle(tmp_path: Path):
    source, out = make_tokenizer(tmp_path / "model"), tmp_path / "int8"
    model = make_model("llama").bfloat16()
    model.config.use_cache = True
    model.save_pretrained(source)
    (source / "training_args.bin").write_bytes(b"\x80\x04.")
    write_int8(source, out, 20_000)
    names = {path.name for path in out.iterdir()}
    weights = {name for name in names if name.endswith(".safetensors")}
    assert len(weights) > 1, "in shards"
    assert {path.suffix for path in out.iterdir()} <= {".safetensors", ".json", ".jinja"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    # Plain transformers, told nothing, gives the model in its own dtype.
    plain = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert plain.config.use_cache
    assert plain.model.norm.weight.dtype == plain(input_ids=IDS).logits.dtype == torch.bfloat16
    assert torch.equal(plain(input_ids=IDS).logits, load_int8(out, torch.bfloat16)(input_ids=IDS).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("a loop")["input_ids"] == transformers.AutoTokenizer.from_pretrained(source)("a loop")["input_ids"]


def test_int8_is_nothing_to_train(tmp_path: Path):
    make_model("llama").save_pretrained(tmp_path / "model")
    write_int8(tmp_path / "model", tmp_path / "int8", 5 << 30)
    student = StudentSection(init="model", model=str(tmp_path / "int8"))
    with pytest.raises(ModelError, match=r"int8 is quantised already \(quant_method = torchao\): .* neither trained"):
        build_student(student, tmp_path / "model", torch.float32)


def test_layers_that_are_not_int8_are_noticed(tmp_path: Path):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"28 linear layers are not int8 when it is loaded again: \['model\.layers\.0"):
        load_int8(tmp_path, torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3_moe"])
def test_families_whose_layers_would_stay_are_refused(family: str):
    with pytest.raises(
        ModelError, match=rf"of type {family} cannot be written as int8; supported are gemma2, .* qwen3\."
    ):
        require_int8(copy.deepcopy(FAMILIES[family]), Path("student"))


def test_without_torchao_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(int8_model, "is_torchao_available", lambda: False)
    with pytest.raises(ConfigError, match=r"needs the package torchao; install it with `pip install -e '\.\[int8\]'`"):
        require_int8(FAMILIES["llama"], Path("student"))
