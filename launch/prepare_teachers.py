"""The inputs of configs/modes/several-teachers.yaml, made once: text of two kinds, each document with the teacher it goes to.

The prose is the quickstart's (the Python reference); the code is the source of the standard library's own modules, which every
Python brings along: some for fine-tuning a teacher of code (``expert``), others for student and measure.

    python launch/prepare_teachers.py          # after launch/prepare_quickstart.py
"""

import json
import random
import shutil
import sysconfig
from pathlib import Path

from rich.console import Console

PROSE, TEXT = Path("data/quickstart"), Path("data/teachers")
CHARACTERS = {"expert": 360_000, "heldout": 40_000, "train": 400_000}
"""Of code, at most about so many."""
LEAST_CHARACTERS, MOST_CHARACTERS = 2_000, 24_000
"""Of a module: those that are a few lines or a library of their own are left out."""

console = Console()


def modules() -> list[tuple[str, str]]:
    """(name, source) of the standard library's modules in a fixed shuffle."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if LEAST_CHARACTERS <= len(source) <= MOST_CHARACTERS:
            found.append((path.stem, source))
    random.Random(0).shuffle(found)
    return found


def write_text(directory: Path) -> None:
    left = modules()
    code: dict[str, list[dict[str, str]]] = {}
    for part, most in CHARACTERS.items():
        rows, size = [], 0
        while left and size < most:
            name, source = left.pop()
            rows.append({"topic": name, "text": source, "teacher": "code"})
            size += len(source)
        code[part] = rows
    prose = {
        part: [json.loads(line) | {"teacher": "prose"} for line in (PROSE / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "heldout")
    }
    for part, rows in code.items():
        lines = [json.dumps(row) for row in [*prose.get(part, []), *rows]]
        (directory / f"{part}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    if not TEXT.is_dir():
        staging = TEXT.with_name(f".{TEXT.name}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_text(staging)
        staging.rename(TEXT)
        console.print(f"text: {TEXT}")


if __name__ == "__main__":
    main()
