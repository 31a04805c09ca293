"""The inputs of configs/modes/*-classification.yaml, made once: real images and text with labels, and teachers that know them.

Images are the handwritten digits that scikit-learn ships (1,797 of 8 x 8 pixels, UCI). Texts are the passages of the Python
language reference (``pydoc_data.topics``), which every Python brings along, by what they are about. Both teachers are trained
here, from fresh weights, in about a minute each, with the labels of all training examples; ``labelled`` is the part of these
whose labels a student without a teacher gets.

    python launch/prepare_classifiers.py [digits] [topics]
"""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import track
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from kdscale.data.images import Pixels

MODELS, DATA = Path("models"), Path("data")
HELD_OUT_DIGITS, LABELLED_DIGITS = 500, 200
PIXELS = Pixels(channels=1, height=8, width=8, scale=1 / 255, mean=(0.5,), std=(0.5,))
ROW_TOKENS, VOCABULARY = 64, 4000
TOPICS = {
    "statement": "assert assignment augassign break class compound continue del exprlists for function global if import"
    " nonlocal pass raise return try while with else exceptions",
    "expression": "atom-identifiers atom-literals attribute-references await binary bitwise booleans calls comparisons"
    " conversions in lambda lists dict operator-summary power shifting slicings subscriptions unary yield",
    "object model": "attribute-access callable-types context-managers customization dynamic-features execmodel id-classes"
    " naming numeric-types objects sequence-types specialattrs specialnames types",
    "text": "formatstrings string-methods strings identifiers",
    "collection": "typesmapping typesseq typesseq-mutable",
    "debugger": "debugger",
}
LEAST_CHARACTERS, HELD_OUT_PASSAGES, LABELLED_PASSAGES = 60, 300, 200

console = Console()
Inputs = Callable[[np.ndarray], dict[str, torch.Tensor]]


def train(model: PreTrainedModel, inputs: Inputs, labels: np.ndarray, *, steps: int, rows: int, lr: float) -> None:
    """Plain cross-entropy with AdamW, warm-up and linear decay; ``inputs`` makes a batch of the given examples."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / steps))
    order = np.random.default_rng(0)
    model.train()
    for _ in track(range(steps), description=f"training {type(model).__name__}", console=console, transient=True):
        chosen = order.integers(0, len(labels), rows)
        logits = model(**inputs(chosen)).logits
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[chosen])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: PreTrainedModel, inputs: Inputs, labels: np.ndarray) -> float:
    model.eval()
    likeliest = model(**inputs(np.arange(len(labels)))).logits.argmax(-1)
    return float((likeliest == torch.from_numpy(labels)).double().mean())


def made(directory: Path, write: Callable[[Path], None]) -> Path:
    """``directory``, which ``write`` fills aside, unless it is there."""
    if not directory.is_dir():
        staging = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write(staging)
        staging.rename(directory)
    return directory


# ---- digits ----


def write_digits(directory: Path) -> None:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise SystemExit("the digits come with scikit-learn; install it with `pip install -e '.[images]'`") from None

    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    held, rest = order[:HELD_OUT_DIGITS], order[HELD_OUT_DIGITS:]
    for name, chosen in (("heldout", held), ("train", rest), ("labelled", rest[:LABELLED_DIGITS])):
        table = pa.table({"image": images[chosen].tolist(), "label": found.target[chosen]})
        pq.write_table(table, directory / f"{name}.parquet")


def read_digits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, 64], labels)."""
    table = pq.read_table(path)
    return np.array(table["image"].to_pylist(), np.uint8).reshape(-1, PIXELS.size), table["label"].to_numpy().copy()


def teach_digits(directory: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=10,
        id2label={number: str(number) for number in range(10)},
        label2id={str(number): number for number in range(10)},
    )
    model = ViTForImageClassification(config)
    images, labels = read_digits(DATA / "digits" / "train.parquet")

    def values(pixels: np.ndarray) -> dict[str, torch.Tensor]:
        return {"pixel_values": PIXELS.values(torch.from_numpy(pixels))}

    train(model, lambda chosen: values(images[chosen]), labels, steps=700, rows=32, lr=2e-3)
    held, held_labels = read_digits(DATA / "digits" / "heldout.parquet")
    console.print(f"digits teacher: held-out accuracy {accuracy(model, lambda n: values(held[n]), held_labels):.3f}")
    model.save_pretrained(directory)
    PIXELS.save(directory)


# ---- topics ----


def write_topics(directory: Path) -> None:
    """Passages that stand under topics of one kind only, in a fixed shuffle."""
    from pydoc_data import topics

    kinds: dict[str, set[str]] = {}
    for kind, names in TOPICS.items():
        for name in names.split():
            for passage in re.split(r"\n\s*\n", topics.topics[name]):
                text = " ".join(passage.split())
                if len(text) >= LEAST_CHARACTERS:
                    kinds.setdefault(text, set()).add(kind)
    rows = [{"text": text, "label": found.pop()} for text, found in sorted(kinds.items()) if len(found) == 1]
    random.Random(0).shuffle(rows)
    held, rest = rows[:HELD_OUT_PASSAGES], rows[HELD_OUT_PASSAGES:]
    for name, part in (("heldout", held), ("train", rest), ("labelled", rest[:LABELLED_PASSAGES])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def read_topics(path: Path) -> tuple[list[str], np.ndarray]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["text"] for row in rows], np.array([list(TOPICS).index(row["label"]) for row in rows])


def teach_topics(directory: Path) -> None:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    texts, labels = read_topics(DATA / "topics" / "train.jsonl")
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=pieces._tokenizer)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=ROW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(TOPICS)),
        label2id={kind: number for number, kind in enumerate(TOPICS)},
    )
    model = BertForSequenceClassification(config)

    def read(some: list[str]) -> dict[str, torch.Tensor]:
        found = tokenizer(some, truncation=True, max_length=ROW_TOKENS, padding=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    train(model, lambda chosen: read([texts[n] for n in chosen]), labels, steps=250, rows=32, lr=1e-3)
    held, held_labels = read_topics(DATA / "topics" / "heldout.jsonl")
    console.print(f"topics teacher: held-out accuracy {accuracy(model, lambda n: read(held), held_labels):.3f}")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main(wanted: list[str]) -> None:
    if unknown := set(wanted) - {"digits", "topics"}:
        sys.exit(f"{', '.join(sorted(unknown))}: known are digits and topics")
    torch.set_num_threads(1)
    if "digits" in wanted or not wanted:
        console.print(f"images: {made(DATA / 'digits', write_digits)}")
        console.print(f"teacher: {made(MODELS / 'digits-vit', teach_digits)}")
    if "topics" in wanted or not wanted:
        console.print(f"text: {made(DATA / 'topics', write_topics)}")
        console.print(f"teacher: {made(MODELS / 'topics-bert', teach_topics)}")


if __name__ == "__main__":
    main(sys.argv[1:])
