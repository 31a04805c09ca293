"""Tiny real classifiers, real images and labelled text."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from sklearn.datasets import load_digits

from kdscale.batch import ExampleBatch
from kdscale.data.images import Pixels
from kdscale.engine.classifiers import AUTO
from kdscale.engine.directories import load_config
from tests.conftest import FAMILIES, PADDED_VOCAB, documents, make_tokenizer

DIGITS, TOPICS = 10, 3
PIXELS = Pixels(1, 8, 8, 1 / 255, (0.5,), (0.5,))
_BERT = {
    "vocab_size": PADDED_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_VIT = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CLASSIFIERS = {
    "bert": transformers.BertConfig(**_BERT),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=PADDED_VOCAB, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64
    ),
    "vit": transformers.ViTConfig(**_VIT),
    **{name: FAMILIES[name] for name in ("llama", "mistral", "qwen2", "qwen3", "gpt2")},
}
"""The families that kdscale supports; without dropout, which DistilBERT has."""


def task_of(family: str) -> str:
    return "image-classification" if family == "vit" else "sequence-classification"


def make_classifier(family: str, seed: int = 0, **changes: object) -> transformers.PreTrainedModel:
    """With weights large enough that its distributions are not flat."""
    fields = {name: value for name, value in CLASSIFIERS[family].to_dict().items() if "label" not in name} | {
        "num_labels": DIGITS if family == "vit" else TOPICS,
        "pad_token_id": 0,
    }
    config = type(CLASSIFIERS[family])(**(fields | changes))
    torch.manual_seed(seed)
    model = AUTO[task_of(family)].from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def save_classifier(directory: Path, family: str, seed: int = 0, **changes: object) -> Path:
    make_classifier(family, seed, **changes).save_pretrained(directory)
    if task_of(family) == "image-classification":
        PIXELS.save(directory)
    else:
        make_tokenizer(directory)
    assert load_config(directory).model_type == family
    return directory


def digits(count: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [count, 8, 8], labels) of handwritten digits."""
    found = load_digits()
    part = slice(first, first + count)
    return np.rint(found.images[part] * (255 / 16)).astype(np.uint8), found.target[part].astype(np.int32)


def write_digits(directory: Path, train: int = 120, heldout: int = 40) -> Path:
    for name, count, first in (("train", train, 0), ("heldout", heldout, train)):
        images, labels = digits(count, first)
        pq.write_table(pa.table({"image": images.tolist(), "label": labels}), directory / f"{name}.parquet")
    return directory


def write_topics(directory: Path, train: int = 50, heldout: int = 10) -> Path:
    """Texts of which each is about as many sentences as its class says."""
    texts = documents(train + heldout)
    rows = [json.dumps({"text": text, "label": text.count("Part") % TOPICS}) + "\n" for text in texts]
    (directory / "train.jsonl").write_text("".join(rows[:train]))
    (directory / "heldout.jsonl").write_text("".join(rows[train:]))
    return directory


def example_batch(family: str, rows: int = 5, seed: int = 0) -> ExampleBatch:
    """Real digits, or random texts of unequal length; one row is not trained on."""
    rng = np.random.default_rng(seed)
    trained = np.arange(rows) != 1
    if task_of(family) == "image-classification":
        images, labels = digits(rows, first=seed * rows)
        return ExampleBatch(seed, images.reshape(rows, -1), np.full(rows, 64, np.int32), labels, trained)
    # Id 0 is padding, and no text holds it.
    ids = rng.integers(1, PADDED_VOCAB - 20, (rows, 24), dtype=np.int32)
    lengths = rng.integers(1, 20, rows, dtype=np.int32)
    return ExampleBatch(seed, ids, lengths, rng.integers(0, TOPICS, rows, dtype=np.int32), trained)
