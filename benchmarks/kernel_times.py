"""Attention and gated products by kernels of our own, beside what they would replace, on a GPU; a JSON object a line.

    python benchmarks/kernel_times.py --out DIR [--budget-s 120]

Attention: for the heads of several models, over documents as the work of `throughput.py` has them, over rows of 2,048
tokens and over one document, beside FlashAttention-2 of torch, with the greatest difference of results. Gated products
with the adapters' small products in the same pass, beside those in passes of their own. Then other cuts of each kernel,
one at a time: what `cuts_for` and `triton_kernels` should say.
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

from laras.models.fused import kernels, triton_attention, triton_kernels, variant
from laras.models.fused.attention import Documents, attention, attention_backward, attention_backward_, document_bounds
from laras.models.fused.triton_attention import Blocks

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
WIDTHS = {"qwen2.5-1.5b": (16_384, 8_960), "a chunk of it": (4_096, 8_960), "qwen2.5-7b": (4_096, 18_944)}
RANKS = 16
RANK_CUTS = (  # rows, columns, warps
    (16, 64, 4), (16, 128, 8), (32, 64, 4), (32, 64, 8), (32, 128, 4), (32, 128, 8), (64, 64, 4), (64, 64, 8),
)  # fmt: skip
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


class Attention:
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

    def beside_flash(self) -> dict[str, Any]:
        return {"flash": self.times(self.flash), "own": self.times(self.own), "difference": self.difference()}

    def difference(self) -> dict[str, float]:
        """Of our results from FlashAttention's, by the largest value."""
        out, saved = self.forward(self.flash)
        expected = [out, *attention_backward(self.gradient, *self.qkv, out, saved, self.flash, self.scale)]
        own, saved = self.forward(self.own)
        attention_backward_(self.gradient, *self.qkv, own, saved, self.own, self.scale, *self.targets)
        pairs = zip(("out", "dq", "dk", "dv"), [own, *self.targets], expected, strict=True)
        return {name: float((a.float() - b.float()).abs().max() / b.float().abs().max()) for name, a, b in pairs}


class GatedProduct:
    """Gate, up and the gradient of their product, in buffers as the fused layers hold them."""

    def __init__(self, tokens: int, width: int) -> None:
        torch.manual_seed(0)

        def rows(count: int, columns: int, room: int) -> Tensor:
            return torch.randn(count, columns + room, device="cuda", dtype=torch.bfloat16)[:, :columns]

        self.width = width
        self.gate_up, self.product = rows(tokens, 2 * width + 2 * RANKS, 0), rows(tokens, width + RANKS, 0)
        self.a, self.b = rows(RANKS, width, RANKS), rows(2 * width, 2 * RANKS, 1536)
        self.own = rows(tokens, RANKS, 0)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.gate_up[:, : self.width],
            self.gate_up[:, self.width : 2 * self.width],
            self.product[:, : self.width],
        )

    def apart(self) -> dict[str, float]:
        gate, up, product = self._parts()
        dy, dyb = self.gate_up[:, : 2 * self.width], self.gate_up[:, 2 * self.width :]

        def forward() -> None:
            kernels.swiglu_(gate, up, product)
            torch.mm(product, self.a.t(), out=self.product[:, self.width :])

        def backward() -> None:
            kernels.swiglu_backward_(gate, up, product)
            torch.mm(product, self.a.t(), out=self.own)
            torch.mm(dy, self.b, out=dyb)

        return {"forward_ms": milliseconds(forward), "backward_ms": milliseconds(backward)}

    def together(self) -> dict[str, float]:
        gate, up, product = self._parts()
        ranks, dyb = self.product[:, self.width :], self.gate_up[:, 2 * self.width :]
        return {
            "forward_ms": milliseconds(lambda: kernels.swiglu_ranks_(gate, up, self.a, product, ranks)),
            "backward_ms": milliseconds(
                lambda: kernels.swiglu_backward_ranks_(gate, up, product, self.a, self.b, dyb, self.own)
            ),
        }

    def both(self) -> dict[str, Any]:
        return {"apart": self.apart(), "together": self.together()}


def measurements() -> Iterator[dict[str, Any]]:
    for model, heads in HEADS.items():
        for name, lengths in DOCUMENTS.items():
            case = Attention(heads, lengths())
            cuts = asdict(triton_attention._cuts(case.qkv[0]))
            yield {"model": model, "heads": heads, "documents": name, "cuts": cuts, **_tried(case.beside_flash)}
    for model, (tokens, width) in WIDTHS.items():
        gated = GatedProduct(tokens, width)
        yield {"model": model, "gated": (tokens, width), **_tried(gated.both)}
    yield from other_attention_cuts(TUNED[0])
    for model, (tokens, width) in WIDTHS.items():
        gated = GatedProduct(tokens, width)
        for cut in RANK_CUTS:
            with mock.patch.multiple(triton_kernels, _RANKS_CUT=cut, _BACKWARD_RANKS_CUT=cut):
                yield {"model": model, "gated": (tokens, width), "cut": cut, **_tried(gated.together)}
    for model in TUNED[1:]:
        yield from other_attention_cuts(model)


def other_attention_cuts(model: str) -> Iterator[dict[str, Any]]:
    case = Attention(HEADS[model], work_lengths())
    chosen = triton_attention._cuts(case.qkv[0])
    for kernel in ("forward", "to_queries", "to_keys"):
        for blocks in CANDIDATES:
            cuts = replace(chosen, **{kernel: blocks})
            with mock.patch.object(triton_attention, "_cuts", lambda _, cuts=cuts: cuts):
                yield {
                    "model": model, "kernel": kernel, "blocks": asdict(blocks),
                    **_tried(lambda: case.times(case.own)),
                }  # fmt: skip


def _tried(times: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return times()
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
    with (arguments.out / "kernels.jsonl").open("a") as file:
        for found in measurements():
            line = json.dumps({"gpu": torch.cuda.get_device_name(), **found})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
            if time.monotonic() > until:
                break


if __name__ == "__main__":
    main()
