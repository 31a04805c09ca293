"""GGUF files: what is written is the model when transformers reads it again; what cannot be said in them is refused."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from kdscale.engine.gguf_file import load_gguf, require_gguf, write_gguf
from kdscale.engine.gguf_tokenizer import require_same_tokens, split_name
from kdscale.errors import ModelError
from tests.conftest import CHAT_TEMPLATE, FAMILIES, make_model, make_tokenizer

IDS = torch.arange(40).unsqueeze(0) * 7 % 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    directory = make_tokenizer(tmp_path_factory.mktemp("bytes"), every_byte=True)
    return transformers.AutoTokenizer.from_pretrained(directory)


def model_of(family: str) -> transformers.PreTrainedModel:
    model = make_model(family)
    if family == "mistral":
        model.config.sliding_window = None
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_read_again_is_the_model(family: str, tokenizer, tmp_path: Path):
    model, path = model_of(family), tmp_path / "model.gguf"
    expected = model(input_ids=IDS).logits
    write_gguf(model, tokenizer, path, "f32", "tiny")
    assert torch.equal(load_gguf(path, torch.float32)(input_ids=IDS).logits, expected)
    sizes = {}
    for kind, off in (("bf16", 0.05), ("f16", 0.01), ("q8_0", 0.1)):
        write_gguf(model, tokenizer, path, kind, "tiny")
        logits = load_gguf(path, torch.float32)(input_ids=IDS).logits
        assert 0 < (logits - expected).abs().max() < off * expected.abs().max(), kind
        sizes[kind] = path.stat().st_size
    assert sizes["q8_0"] < sizes["f16"] == sizes["bf16"]


def test_its_tokenizer_is_the_models(tokenizer, tmp_path: Path):
    path = tmp_path / "model.gguf"
    write_gguf(model_of("llama"), tokenizer, path, "q8_0", "tiny")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    require_same_tokens(tokenizer, loaded)
    chat = [{"role": "user", "content": "Go on 3 times."}]
    assert loaded.chat_template == CHAT_TEMPLATE
    assert loaded.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert loaded("<|user|>a<|end|>")["input_ids"] == tokenizer("<|user|>a<|end|>")["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_token_id
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    merged = copy.deepcopy(tokenizer)
    merged.add_tokens(["loops took"])
    with pytest.raises(ModelError, match="gives other ids: from token"):
        require_same_tokens(merged, loaded)
    write_gguf(model_of("llama"), other, path, "q8_0", "tiny")
    require_same_tokens(other, transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name))


def test_splits_have_the_names_that_llama_cpp_knows(tokenizer):
    qwen = transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX
    split = {"type": "Split", "pattern": {"Regex": qwen}, "behavior": "Isolated", "invert": False}
    ready = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    assert split_name({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, ready]}}) == "qwen2"
    assert split_name({"pre_tokenizer": ready | {"use_regex": True}}) == "gpt-2"
    for unknown in (None, ready, ready | {"use_regex": True, "add_prefix_space": True}, {"type": "Whitespace"}):
        with pytest.raises(ModelError, match=r"for which kdscale knows no name in GGUF; known are the splits"):
            split_name({"pre_tokenizer": unknown})


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gemma2", {}, r"of type gemma2 cannot be written as GGUF; supported are llama, mistral, qwen2, qwen3"),
        ("gpt2", {}, r"of type gpt2 cannot"),
        ("mistral", {}, r"attention in a sliding window of a mistral model"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"attention in a sliding window of a qwen3",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            r"rope_type = linear",
        ),
        ("llama", {"attention_bias": True}, r"attention_bias = true"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act = gelu"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, r"a LlamaForSequenceClassification cannot"),
    ],
)
def test_what_a_file_cannot_say_is_refused(family: str, fields: dict, message: str):
    config = copy.deepcopy(FAMILIES[family])
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match=message):
        require_gguf(config, Path("student"))


def test_tokens_that_a_file_cannot_say_are_refused(tokenizer_dir: Path, tokenizer, tmp_path: Path):
    lacking = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    with pytest.raises(ModelError, match=r"no token for \d+ of the 256 bytes and puts <unk> in their place"):
        write_gguf(model_of("llama"), lacking, tmp_path / "model.gguf", "f32", "tiny")
    # Without that token it leaves them out itself.
    lacking.backend_tokenizer.model.unk_token = None
    write_gguf(model_of("llama"), lacking, tmp_path / "model.gguf", "f32", "tiny")
    require_same_tokens(lacking, transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"))
    fields = copy.deepcopy(FAMILIES["llama"])
    fields.intermediate_size = 40
    odd = transformers.AutoModelForCausalLM.from_config(fields)
    with pytest.raises(ModelError, match=r"rows of 40 elements, and q8_0 stores blocks of 32; use --type f16 or bf16"):
        write_gguf(odd, tokenizer, tmp_path / "model.gguf", "q8_0", "tiny")
