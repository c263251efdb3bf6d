"""Attention by our own kernels beside FlashAttention-2 of torch, on a GPU; one JSON object a line.

    python benchmarks/attention.py --out DIR [--budget-s 120]

For the heads of several models, over documents as the work of `throughput.py` has them, over rows of 2,048 tokens and
over one document. First the cuts that runs take (`cuts`), with the greatest difference of results from those of
FlashAttention; then others for each kernel, one at a time, for the first kind of documents: what `cuts_for` should say.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import throughput
import torch
from torch import Tensor

from laras.models.fused import triton_attention, variant
from laras.models.fused.attention import Documents, attention, attention_backward, attention_backward_, document_bounds
from laras.models.fused.triton_attention import Blocks, Cuts

TOKENS = 16_384
HEADS = {  # query heads, key-value heads, channels
    "qwen2.5-1.5b": (12, 2, 128), "llama-3-8b": (32, 8, 128), "smollm2-135m": (9, 3, 64), "phi-3-mini": (32, 32, 96),
    "gemma-2b": (8, 1, 256),
}  # fmt: skip
CANDIDATES = [
    Blocks(*cut)
    for cut in (
        (64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (32, 64, 4, 2),
        (64, 32, 4, 3), (64, 128, 8, 2), (128, 128, 8, 2), (32, 32, 4, 2),
    )
]  # fmt: skip
TUNED = ("qwen2.5-1.5b", "smollm2-135m", "gemma-2b")  # one for each width that cuts differ by
WARM, ROUNDS = 3, 9


def work_lengths() -> list[int]:
    """Documents of the work of `throughput.py`, as many as fill the batch, the last one cut."""
    found: list[int] = []
    for length in throughput.lengths():
        found.append(min(length, TOKENS - sum(found)))
        if sum(found) == TOKENS:
            return found
    raise ValueError(f"the work is shorter than {TOKENS} tokens")


DOCUMENTS: dict[str, Callable[[], list[int]]] = {
    "work": work_lengths, "rows of 2,048": lambda: [2048] * (TOKENS // 2048), "one": lambda: [TOKENS],
}  # fmt: skip


def milliseconds(call: Callable[[], Any]) -> float:
    """Median of the GPU's time for one call."""
    for _ in range(WARM):
        call()
    found = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


class Case:
    """Queries, keys and values side by side, as the fused layers hold them, and the gradient to the output."""

    def __init__(self, heads: tuple[int, int, int], lengths: list[int]) -> None:
        many, few, channels = heads
        torch.manual_seed(0)

        def rows() -> list[Tensor]:
            buffer = torch.randn(TOKENS, (many + 2 * few) * channels + 16, device="cuda", dtype=torch.bfloat16)
            return list(buffer[:, :-16].unflatten(1, (-1, channels)).split([many, few, few], dim=1))

        self.qkv, self.targets = rows(), rows()
        self.gradient = torch.randn(TOKENS, many, channels, device="cuda", dtype=torch.bfloat16)
        self.scale = channels**-0.5
        cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        longest = max(*lengths, throughput.MAX_LENGTH if len(lengths) > 1 else 0)  # runs do not look at a batch's own
        self.flash = Documents(cu_seqlens, longest, self.gradient, self.gradient)
        self.own = replace(self.flash, bounds=document_bounds(cu_seqlens, TOKENS))

    def forward(self, documents: Documents) -> tuple[Tensor, Any]:
        return attention(*self.qkv, documents, self.scale)

    def times(self, documents: Documents) -> dict[str, float]:
        out, saved = self.forward(documents)

        def backward() -> None:
            if documents.bounds is None:
                attention_backward(self.gradient, *self.qkv, out, saved, documents, self.scale)
            else:
                attention_backward_(self.gradient, *self.qkv, out, saved, documents, self.scale, *self.targets)

        return {"forward_ms": milliseconds(lambda: self.forward(documents)), "backward_ms": milliseconds(backward)}

    def difference(self) -> dict[str, float]:
        """Of our results from FlashAttention's, by the largest value."""
        out, saved = self.forward(self.flash)
        expected = [out, *attention_backward(self.gradient, *self.qkv, out, saved, self.flash, self.scale)]
        own, saved = self.forward(self.own)
        attention_backward_(self.gradient, *self.qkv, own, saved, self.own, self.scale, *self.targets)
        pairs = zip(("out", "dq", "dk", "dv"), [own, *self.targets], expected, strict=True)
        return {name: float((a.float() - b.float()).abs().max() / b.float().abs().max()) for name, a, b in pairs}


def measurements(until: float) -> Iterator[dict[str, Any]]:
    for model, heads in HEADS.items():
        for name, lengths in DOCUMENTS.items():
            case = Case(heads, lengths())
            yield {
                "model": model, "heads": heads, "documents": name, "cuts": asdict(triton_attention._cuts(case.qkv[0])),
                "flash": case.times(case.flash), "own": case.times(case.own), "difference": case.difference(),
            }  # fmt: skip
    for model in TUNED:
        case = Case(HEADS[model], work_lengths())
        chosen = triton_attention._cuts(case.qkv[0])
        for kernel in ("forward", "to_queries", "to_keys"):
            for blocks in CANDIDATES:
                if time.monotonic() > until:
                    return
                yield {
                    "model": model,
                    "kernel": kernel,
                    "blocks": asdict(blocks),
                    **_tried(case, chosen, kernel, blocks),
                }


def _tried(case: Case, chosen: Cuts, kernel: str, blocks: Blocks) -> dict[str, Any]:
    with mock.patch.object(triton_attention, "_cuts", lambda _: replace(chosen, **{kernel: blocks})):
        try:
            return dict(case.times(case.own))
        except Exception as error:  # noqa: BLE001 - too much shared memory is one way of many
            return {"error": f"{type(error).__name__}: {error}"[:120]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=120)
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.budget_s
    variant.CHOSEN = replace(variant.CHOSEN, direct_launch=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "attention.jsonl").open("a") as file:
        for found in measurements(until):
            line = json.dumps({"gpu": torch.cuda.get_device_name(), **found})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()


if __name__ == "__main__":
    main()
