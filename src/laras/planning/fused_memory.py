"""Memory of the fused layers (`laras.models.fused`) in closed form, from the buffers that each pass allocates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from laras.planning.layer_forms import FUSED_TYPES, LAYER_FORMS
from laras.records import ModelSpec

if TYPE_CHECKING:
    from laras.planning.memory import MemoryCase

__all__ = ["FUSED_TYPES", "fused_peak", "fused_static_bytes"]
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


def fused_static_bytes(spec: ModelSpec, case: MemoryCase, element: int) -> int:
    """Bytes beyond weights and adapters: the adapters' copies, and the unpacked 4-bit weights of one layer."""
    s = _sizes(spec, case.lora_r)
    groups = (
        (s.hidden, s.qkv, s.rank_qkv),
        (s.query, s.hidden, s.rank_o),
        (s.hidden, 2 * s.width, s.rank_gate_up),
        (s.width, s.hidden, s.rank_down),
    )
    if case.weights == "nf4":
        unpacked = sum((outputs + ranks) * (inputs + ranks) for inputs, outputs, ranks in groups)
        factors = spec.layers * sum(ranks * (inputs + outputs) for inputs, outputs, ranks in groups)
        return element * (unpacked + factors)
    beside = sum((outputs + ranks) * (inputs + ranks) - outputs * inputs for inputs, outputs, ranks in groups)
    return element * spec.layers * beside


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
    s = _sizes(spec, case.lora_r)
    tokens = case.micro_batch * case.length_tokens
    kind = (case.checkpoint_kind if case.checkpoint_kind != "none" else "full") if case.checkpointing else "none"
    attended = element * (s.qkv + s.rank_qkv + s.query + s.rank_o + s.hidden) + _LSE_BYTES * spec.attention_heads
    feed = element * (2 * s.width + 2 * s.rank_gate_up + s.rank_down)
    per_token = element * s.hidden + {"none": attended + feed, "selective": attended, "full": 0}[kind]
    kept = spec.layers * per_token * tokens
    loss_chunk = min(tokens, case.loss_chunk_tokens or tokens)
    head = element * (4 * s.hidden * tokens + loss_chunk * spec.vocab_size)

    chunk = tokens if kind == "none" else min(tokens, case.mlp_chunk_tokens)
    total = element * (2 * s.hidden + max(s.rank_o, s.rank_down)) * tokens
    recomputed = attended * tokens if kind == "full" else 0
    feed_work = element * (s.width + s.hidden + s.rank_gate_up) * chunk
    feed_work += feed * chunk if kind != "none" else 0
    grouped = 2 * element * s.query if s.query != s.key_value else 0
    attention_work = element * (2 * s.query + 2 * s.key_value) + 4 * s.query + grouped
    attention_work = attention_work * tokens - (feed * tokens if kind == "none" else 0)
    gradients = sum(inputs + outputs for _, inputs, outputs in layers) * case.lora_r * 4
    backward = total + recomputed + max(feed_work, attention_work) + gradients
    return (kept, head, "logits") if head > backward else (kept, backward, "layer_backward")
