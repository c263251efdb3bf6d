"""Memory of the fused layers (`laras.models.fused`) in closed form, from the buffers that each pass allocates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from laras.planning.layer_forms import FUSED_TYPES, LAYER_FORMS
from laras.records import ModelSpec

if TYPE_CHECKING:
    from laras.planning.memory import MemoryCase

__all__ = ["FUSED_TYPES", "fused_peak", "fused_static_bytes", "offloaded_bytes"]
_LSE_BYTES = 4


@dataclass(frozen=True)
class _Sizes:
    """Columns of a layer's buffers, in elements."""

    hidden: int
    query: int
    key_value: int
    width: int
    rank_qkv: int
    rank_o: int
    rank_gate_up: int
    rank_down: int

    @property
    def qkv(self) -> int:
        return self.query + 2 * self.key_value


def _sizes(spec: ModelSpec, rank: int) -> _Sizes:
    def rounded(ranks: int) -> int:
        return -(-ranks // 16) * 16

    query, key_value = spec.attention_heads * spec.head_dim, spec.key_value_heads * spec.head_dim
    form = LAYER_FORMS[spec.model_type]
    return _Sizes(
        spec.hidden_size, query, key_value, spec.intermediate_size,
        rounded(len(form.qkv) * rank), rounded(rank), rounded(len(form.gate_up) * rank), rounded(rank),
    )  # fmt: skip


def _groups(s: _Sizes) -> dict[str, tuple[int, int, int]]:
    """Inputs, outputs and ranks of what is one product."""
    return {
        "qkv": (s.hidden, s.qkv, s.rank_qkv),
        "o": (s.query, s.hidden, s.rank_o),
        "gate_up": (s.hidden, 2 * s.width, s.rank_gate_up),
        "down": (s.width, s.hidden, s.rank_down),
    }


def fused_static_bytes(spec: ModelSpec, case: MemoryCase, element: int) -> int:
    """Bytes beyond weights and adapters: the adapters' copies, beside 16-bit weights with the corner between them."""
    groups = _groups(_sizes(spec, case.lora_r)).values()
    if case.weights == "nf4":
        return element * spec.layers * sum(ranks * (inputs + outputs) for inputs, outputs, ranks in groups)
    beside = sum((outputs + ranks) * (inputs + ranks) - outputs * inputs for inputs, outputs, ranks in groups)
    return element * spec.layers * beside


def offloaded_bytes(spec: ModelSpec, tokens: int, element: int) -> int:
    """Main memory for the inputs of all layers but the last, each in a power of two.

    Source: `laras.models.fused.offload`; c10's allocator of pinned memory rounds so.
    """
    return (spec.layers - 1) * element * (1 << (tokens * spec.hidden_size - 1).bit_length())


def fused_peak(
    spec: ModelSpec, case: MemoryCase, layers: Sequence[tuple[str, int, int]], element: int
) -> tuple[int, int, str]:
    """Activations kept, what comes on top at the peak, and the name of that component.

    Args:
        spec: The architecture.
        case: What decides the memory.
        layers: The adapted linear layers.
        element: Bytes of an element of the arithmetic.
    """
    s, form = _sizes(spec, case.lora_r), LAYER_FORMS[spec.model_type]
    tokens = case.tokens
    kind = (case.checkpoint_kind if case.checkpoint_kind != "none" else "full") if case.checkpointing else "none"
    offloads, held = kind == "offload", spec.layers
    if offloads:  # on the device there is the input of a layer, and that of the one before, on its way
        kind, held = "full", min(2, spec.layers)
    chunk = tokens if kind == "none" else min(tokens, case.mlp_chunk_tokens)
    qkv = element * (s.qkv + s.rank_qkv)
    out = element * (s.query + s.rank_o) + _LSE_BYTES * spec.attention_heads
    middle = element * s.hidden
    feed = element * (2 * s.width + 2 * s.rank_gate_up + s.rank_down)
    attended = qkv + out + middle
    per_token = element * s.hidden + {"none": attended + feed, "selective": attended, "full": 0}[kind]
    kept = held * per_token * tokens
    loss_chunk = min(tokens, case.loss_chunk_tokens or tokens)
    head = element * ((3 if offloads else 4) * s.hidden * tokens + loss_chunk * spec.vocab_size)

    # Backward of the last layer, in its feed-forward part and in attention, beside what was kept.
    gradient = element * (s.hidden + max(s.rank_o, s.rank_down)) * tokens
    feed_part = element * (s.width + s.hidden + s.rank_gate_up) * chunk
    if kind != "none":
        feed_part += feed * chunk
    if kind == "full":
        feed_part += out * tokens + middle * chunk + (0 if case.weights == "nf4" else qkv * tokens)
    share = 0.5 if kind != "none" and spec.key_value_heads % 2 == 0 else 1.0  # of the heads, at a time
    heads = element * (2 * s.query + 2 * s.key_value) + 4 * s.query  # gradients, and the kernel's sums in fp32
    heads += 2 * element * s.query if s.query != s.key_value else 0
    heads += element * (s.query + s.key_value) if form.head_norm else 0
    freed = {"none": feed + middle, "selective": middle, "full": -(qkv + out)}[kind]
    attention_part = (int(share * heads) + qkv - freed) * tokens
    if case.weights == "nf4":  # unpacked while a part runs; o forms the hidden states of a chunk
        sizes = _groups(s)
        unpacked = {
            name: element * (outputs + ranks) * (inputs + ranks) for name, (inputs, outputs, ranks) in sizes.items()
        }
        feed_part += unpacked["gate_up"] + unpacked["down"] + (unpacked["o"] if kind == "full" else 0)
        attention_part += unpacked["qkv"] + unpacked["o"]
    gradients = sum(inputs + outputs for _, inputs, outputs in layers) * case.lora_r * 4
    if offloads and not case.keeps_gradients:  # no inputs go while gradients come: the peak is in the second layer
        gradients *= max(1, spec.layers - 1)
    backward = gradient + max(feed_part, attention_part) + gradients
    return (kept, head, "logits") if head > backward else (kept, backward, "layer_backward")
