"""Tiny real models, a tiny real tokenizer and a little text, made once a session."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kdscale.config.hardware import cpu_sums_int8

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The same examples for the same test: a change decides whether tests pass, not chance. By hand, others are looked for:
# `python -m pytest --hypothesis-profile search tests/properties tests/unit`.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile("same")
torch.set_num_threads(1)

SENTENCES = [
    "The loop variable is bound to each item of the sequence in turn.",
    "An assignment evaluates the expression list and assigns the result to each target.",
    "A class definition is an executable statement that binds a name in the local scope.",
    "Functions may return several values, which arrive as one tuple on the other side.",
    "The with statement wraps the execution of a block with methods of a context manager.",
    "Exceptions are raised when the interpreter meets an error that it cannot repair.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PADDED_VOCAB = 320
"""Rows of the tiny models' embeddings; the tokenizer has fewer ids."""


# There `--format int8` refuses, which a test of its own holds on every processor.
needs_int8 = pytest.mark.skipif(not cpu_sums_int8(), reason="int8 sums overflow on a processor without VNNI")


def documents(count: int) -> list[str]:
    """Documents of unequal length, none like another."""
    return [
        " ".join(f"{SENTENCES[(n * 7 + k * 5) % 6]} Part {n}.{k}." for k in range(1 + (n * 3) % 7))
        for n in range(count)
    ]


def make_tokenizer(
    directory: Path,
    *,
    vocab_size: int = 300,
    chat: str | None = CHAT_TEMPLATE,
    every_byte: bool = False,
    eos_token: str = "<eos>",
) -> Path:
    """``chat``: its template. Neither that nor ``eos_token`` changes how a text is read."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<unk>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if every_byte else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents(40), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=eos_token)
    if chat is not None:
        tokenizer.chat_template = chat
    tokenizer.save_pretrained(directory)
    return directory


FAMILIES = {
    "llama": transformers.LlamaConfig(
        vocab_size=PADDED_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen2": transformers.Qwen2Config(
        vocab_size=PADDED_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    "qwen3": transformers.Qwen3Config(
        vocab_size=PADDED_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=PADDED_VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
    ),
    "gemma2": transformers.Gemma2Config(
        vocab_size=PADDED_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=5.0,
        sliding_window=8,
    ),
    "gemma3_text": transformers.Gemma3TextConfig(
        vocab_size=PADDED_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=5.0,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": transformers.MistralConfig(
        vocab_size=PADDED_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=PADDED_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "mixtral": transformers.MixtralConfig(
        vocab_size=PADDED_VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        vocab_size=PADDED_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    ),
}


def make_model(family: str, seed: int = 0, **fields: int) -> transformers.PreTrainedModel:
    """A tiny model with weights large enough that its distributions are not flat; ``fields`` change its config."""
    torch.manual_seed(seed)
    config = copy.deepcopy(FAMILIES[family])
    config.update(fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    model.config.use_cache = False
    return model


def make_colleague(directory: Path, seed: int) -> Path:
    """Another teacher with the tokenizer of ``teacher_dir``, wider and of fewer layers."""
    make_model("llama", seed, hidden_size=48, num_hidden_layers=2).save_pretrained(directory)
    return make_tokenizer(directory)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer Llama with a padded vocabulary, and its tokenizer."""
    directory = tmp_path_factory.mktemp("teacher")
    make_model("llama").save_pretrained(directory)
    make_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and heldout.jsonl."""
    return write_text(tmp_path_factory.mktemp("text"))


def write_text(directory: Path) -> Path:
    texts = documents(60)
    for name, part in (("train", texts[:50]), ("heldout", texts[50:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return directory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-matrix", action="store_true", help="tests/distributed/test_resume_matrix.py: all cases, not only pairs"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: what breaks cheaply should break soon."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
