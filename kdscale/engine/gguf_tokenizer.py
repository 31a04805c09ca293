"""A byte-level BPE tokenizer in the terms of GGUF."""

import json
from typing import Any

from tokenizers import pre_tokenizers

from kdscale.errors import ModelError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""GGUF's kinds of tokens."""
SAMPLE = (
    "The 3 loops took 12.75 s on 2026-11-24;\n\n\tprint(f'{x!r}')  # naïve, 漢字, émigré's   don't I'LL\n"
    "def  area(r):\r\n    return 3.14159 * r ** 2 ... \U0001f600 \u0645\u0631\u062d\u0628\u0627"
)
"""Text on which ways to split differ: digits, line ends, contractions, runs of spaces, other scripts."""


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Describe a transformers ``tokenizer`` to a ``GGUFWriter``, with one token for each of the embedding's ``rows``.

    Raises:
        ModelError: it is not a byte-level BPE whose split llama.cpp knows.
    """
    described = _described(tokenizer)
    added = {one["id"]: one for one in described["added_tokens"]}
    pieces = {index: token for token, index in tokenizer.get_vocab().items()}
    lacking = set(pre_tokenizers.ByteLevel.alphabet()) - set(pieces.values())
    if lacking and described["model"]["unk_token"] is not None:
        raise ModelError(
            f"the tokenizer has no token for {len(lacking)} of the 256 bytes and puts {described['model']['unk_token']} in their"
            " place; readers of GGUF files leave them out"
        )
    tokens, kinds = [], []
    for index in range(rows):
        # Rows that the tokenizer has no token for still need a name of their own.
        tokens.append(pieces.get(index, f"[PAD{index}]"))
        if index in added:
            kinds.append(_CONTROL if added[index]["special"] else _USER_DEFINED)
        else:
            kinds.append(_NORMAL if index in pieces else _UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(described))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = described["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    begun = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and begun[0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def split_name(described: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer (as ``tokenizer.json`` has it) splits text before its merges.

    Raises:
        ModelError: naming what is not known.
    """
    # Its regular expressions, which its own reader of GGUF goes by.
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    before = described["pre_tokenizer"] or {"type": "none"}
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    match [step["type"] for step in steps]:
        case ["ByteLevel"] if _splits_itself(steps[0]):
            return "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"] and _splits_itself(steps[1]):
            return "smollm"
        case ["Split", "ByteLevel"] if not steps[1]["use_regex"]:
            pattern = steps[0]["pattern"].get("Regex")
            for name in ("llama-bpe", "qwen2"):
                if pattern == GGUF_PRE_TOKENIZER_SPLITS[name]:
                    return name
    raise ModelError(
        f"the tokenizer splits text by {json.dumps(before)[:300]}, for which kdscale knows no name in GGUF; known are the splits"
        " of GPT-2, SmolLM, Llama 3 and Qwen 2"
    )


def _splits_itself(step: dict[str, Any]) -> bool:
    return bool(step["use_regex"]) and not step["add_prefix_space"]


def _described(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's own description. Raises: ModelError."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "none"}}
    model, normalizer = described["model"], described.get("normalizer")
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ModelError(
            f"{type(tokenizer).__name__} ({model['type']}) is no byte-level BPE tokenizer; only those can be written as GGUF"
        )
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ModelError(f"the tokenizer normalizes text by {normalizer['type']}, which a GGUF file cannot say")
    return described


def require_same_tokens(tokenizer: Any, loaded: Any) -> None:
    """``loaded`` is what transformers reads from the file. Raises: ModelError when it cuts ``SAMPLE`` into other tokens."""
    if split_name(_described(tokenizer)) == "smollm":
        # The one split that transformers does not know by its name; vocabulary and merges are compared all the same.
        loaded.backend_tokenizer.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    ours, theirs = (one(SAMPLE, add_special_tokens=False)["input_ids"] for one in (tokenizer, loaded))
    if ours != theirs:
        at = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(theirs))
        raise ModelError(
            f"the tokenizer read from the GGUF file gives other ids: from token {at} on {theirs[at : at + 5]}, not"
            f" {ours[at : at + 5]}"
        )
