"""Attention of packed rows on a processor, by documents, against torch's kernel over the whole mask.

    python -m tests.benchmarks.attention --json attention.json

SmolLM2's heads (9 of width 64, 3 of keys), one thread, in turns within one process; values and gradients are compared first.
``full`` is forward and backward. torch's side gets what transformers gives it: keys repeated, a boolean mask, or
``is_causal`` where a row is one document.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface

import kdscale.engine.attention  # noqa: F401 - registers it
from tests.benchmarks.turns import alternate, machine, spread

HEADS, GROUPS, WIDTH, ROUNDS = 9, 3, 64, 15
SHAPES = ((4, 256, 256), (4, 256, 100), (1, 1024, 1024), (1, 1024, 60))
"""Rows, columns, tokens of a document."""
ATTEND = AttentionInterface()["kdscale_documents"]


def measure(rows: int, columns: int, document: int, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    query = torch.randn(rows, HEADS, columns, WIDTH, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(rows, GROUPS, columns, WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
    upstream = torch.randn(rows, columns, HEADS, WIDTH, dtype=dtype)
    here = torch.arange(columns)
    positions = (here % document).repeat(rows, 1)
    seen = (here[:, None] // document == here // document) & (here[:, None] >= here)
    mask = seen.expand(rows, 1, -1, -1) if document < columns else None

    def whole() -> torch.Tensor:
        repeated = (one.repeat_interleave(HEADS // GROUPS, 1) for one in (key, value))
        found = torch.nn.functional.scaled_dot_product_attention(
            query, *repeated, attn_mask=mask, is_causal=mask is None
        )
        return found.transpose(1, 2).contiguous()

    def by_document() -> torch.Tensor:
        found: torch.Tensor = ATTEND(None, query, key, value, None, scaling=WIDTH**-0.5, position_ids=positions)[0]
        return found

    def full(side: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(side(), (query, key, value), upstream)

    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for ours, theirs in zip((by_document(), *full(by_document)), (whole(), *full(whole)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

    def forward(side: Callable[[], torch.Tensor]) -> None:
        with torch.no_grad():
            side()

    result: dict[str, Any] = {"rows": rows, "columns": columns, "document": document, "dtype": str(dtype)[6:]}
    for name, work in (("forward", forward), ("full", full)):
        seconds = alternate({"whole": lambda: work(whole), "documents": lambda: work(by_document)}, ROUNDS)  # noqa: B023
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        result[name] = {
            "whole_seconds": medians["whole"],
            "documents_seconds": medians["documents"],
            "whole_of_documents": medians["whole"] / medians["documents"],
            "spread": {side: spread(values) for side, values in seconds.items()},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(*shape, dtype) for dtype in (torch.bfloat16, torch.float32) for shape in SHAPES]
    for one in results:
        print(
            f"{one['dtype']:8} {one['rows']} x {one['columns']:4}, documents of {one['document']:4}:"
            f" forward {one['forward']['documents_seconds'] * 1e3:6.2f} ms, {one['forward']['whole_of_documents']:.2f}x faster;"
            f" with backward {one['full']['documents_seconds'] * 1e3:6.2f} ms, {one['full']['whole_of_documents']:.2f}x faster"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": results, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
