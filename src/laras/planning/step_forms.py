"""The work of a training step in closed form: the operations that simulated steps were counted to have, by path.

Fused layers are written by hand, so their products and launches are known one by one; of transformers' layers the
number for each linear layer is about the same in every architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from laras.planning.layer_forms import LAYER_FORMS
from laras.planning.memory import MemoryCase, adapted_layers, linear_layers
from laras.planning.work import Product, Work
from laras.records import ModelSpec

COPY_CALLS = 8  # of a copy to main memory or back, with what keeps the streams in order
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5  # of causal attention, whose square is half empty
_UNPACKED_BYTES = 2.6  # read and written for a 4-bit weight each time it is unpacked
_LOGIT_BYTES = {"full": 64, "chunked": 6.3}  # moved for every logit
_UPDATE_BYTES, _COPY_BYTES = 28, 6  # of an adapter's float: its update, its copy beside the weights
# What libraries do in Python, as so many operations: checkpointing for a layer, with the hooks of its saved tensors;
# bitsandbytes for the 8-bit update of a parameter, after which the host waits, for a 4-bit product, for unpacking its
# weights in backward, and for a product of int8. Source: fitted to steps on an H200, `benchmarks/step_time.py`;
# bitsandbytes 0.50 `optim/optimizer.py`, `step`.
CHECKPOINT_CALLS, UPDATE_8BIT_CALLS = 45, 5
NF4_CALLS, UNPACKING_CALLS, INT8_CALLS = 10, 10, 40
# Bytes that take as long to move as the 8-bit update of an element takes, since finding the codes takes longer than
# moving them. Source: timed on an H200, 27 to 29 ps an element in models of 1.2 to 2.5 billion.
UPDATE_8BIT_BYTES = 86
_PLAIN_VIEWS = 0.42  # share of the calls of a transformers' layer that only make room, or another view
_GATHERED = Work(views=20, calls=9, kernels=9)  # of a batch: embedding, positions
# Of transformers' layers, for each linear layer and one more: calls of modules, of autograd's engine, kernels, and
# tensors of the layer's hidden and feed-forward size that these read or write.
_PLAIN_FORWARD = {"calls": 23, "engine": 0, "kernels": 9.5, "traffic": 5.0}
_PLAIN_BACKWARD = {"calls": 0, "engine": 34, "kernels": 12, "traffic": 7.0}
_PLAIN_AGAIN = {"calls": 20.5, "engine": 10, "kernels": 7.5, "traffic": 5.0}
_FULL_SHARE, _FP32_SHARE = 0.45, 0.78  # of that: without adapters, without casts
_MASKED = 2  # where rows are padded, layers of transformers get a mask: the square is full
_PACKED_CALLS = {"nf4": (NF4_CALLS, UNPACKING_CALLS), "int8": (INT8_CALLS, 0)}  # in forward and in backward
_PLAIN_UNPACK_KERNELS = 3
# Of DoRA, for each adapted layer: calls, kernels, and bytes of an element of what it multiplies token by token, of the
# identity that goes through the adapter, and of the matrix that it norms.
_DORA_FORWARD = {"calls": 21, "engine": 0, "kernels": 13, "outputs": 48, "identity": 14, "matrix": 16}
_DORA_BACKWARD = {"calls": 0, "engine": 17, "kernels": 13, "outputs": 78, "identity": 0, "matrix": 0}


@dataclass(frozen=True)
class _Fused:
    """Operations of a fused layer, and what every chunk of its feed-forward part but the first adds.

    Attributes:
        views: Issued by Python, which only make room or another view.
        calls: Others.
        compiled: Kernels of the product's own.
        kernels: All but matrix products.
        more: The same four, for another chunk.
        unpacking: The same four, where weights are 4-bit ones.
    """

    views: int
    calls: int
    compiled: int
    kernels: int
    more: tuple[int, int, int, int] = (0, 0, 0, 0)
    unpacking: tuple[int, int, int, int] = (11, 4, 4, 4)

    def work(self, layers: int, chunks: int, *, four_bit: bool) -> Work:
        numbers = (self.views, self.calls, self.compiled, self.kernels)
        views, calls, compiled, kernels = (
            layers * (number + (chunks - 1) * more + (unpacking if four_bit else 0))
            for number, more, unpacking in zip(numbers, self.more, self.unpacking, strict=True)
        )
        return Work(views=views, calls=calls, compiled=compiled, kernels=kernels)


_FORWARD = {
    "none": _Fused(56, 18, 5, 9),
    "selective": _Fused(55, 16, 5, 7, (25, 6, 2, 2)),
    "full": _Fused(53, 16, 5, 7, (24, 6, 2, 2)),
}
_BACKWARD = {
    "none": _Fused(93, 22, 5, 14),
    "selective": _Fused(127, 34, 8, 22, (39, 15, 3, 8)),
    "full": _Fused(158, 44, 11, 27, (50, 18, 3, 8), (31, 11, 8, 9)),
}


def closed_work(spec: ModelSpec, case: MemoryCase) -> dict[str, Work]:
    """The work of each kind of segment, as `StepTrace.work` gives it; of a second micro-batch, what differs."""
    forward, backward = _fused_layers(spec, case) if case.fused else _plain_layers(spec, case)
    tensors = _trained_tensors(spec, case)
    size = 4 if case.adapters != "compute" and not case.full else _element(case)
    trained = spec.total_parameters if case.full else _adapter_parameters(spec, case)
    copied = Work(calls=tensors, kernels=tensors, moved_bytes=_COPY_BYTES * trained) if case.fused else Work()
    update = Work(calls=tensors, moved_bytes=_UPDATE_BYTES // 4 * size * trained)
    if case.optim.endswith("8bit"):
        moved = UPDATE_8BIT_BYTES * trained
        update = Work(graph_calls=UPDATE_8BIT_CALLS * tensors, kernels=tensors, moved_bytes=moved, waits=tensors)
    backward = replace(backward, engine_calls=backward.engine_calls + tensors)
    added = replace(backward, kernels=backward.kernels + tensors, moved_bytes=backward.moved_bytes + 3 * size * trained)
    return {
        "batch": _GATHERED.plus(copied),
        "forward": forward,
        "loss": _loss(spec, case),
        "backward": backward,
        "batch again": _GATHERED,
        "backward again": added,
        "optimizer": update,
    }


def _element(case: MemoryCase) -> int:
    return 4 if case.precision == "fp32" else 2


def _adapter_parameters(spec: ModelSpec, case: MemoryCase) -> int:
    layers = adapted_layers(spec, case.target_modules)
    return spec.layers * case.lora_r * sum(inputs + outputs for _, inputs, outputs in layers)


def _trained_tensors(spec: ModelSpec, case: MemoryCase) -> int:
    if case.full:
        return spec.layers * (len(linear_layers(spec)) + 2) + 2
    return 2 * spec.layers * len(adapted_layers(spec, case.target_modules))


def _loss(spec: ModelSpec, case: MemoryCase) -> Work:
    """Logits of every token, in chunks or at once, and their gradients."""
    tokens, element = case.tokens, _element(case)
    chunks = ceil(tokens / case.loss_chunk_tokens) if case.loss_kind == "chunked" and case.loss_chunk_tokens else 1
    rows, hidden, words = ceil(tokens / chunks), spec.hidden_size, spec.vocab_size
    products: Counter[Product] = Counter()
    for product in ((rows, hidden, words), (rows, words, hidden), *([(words, rows, hidden)] if case.full else [])):
        products[*product, element] += chunks
    moved = int(tokens * words * _LOGIT_BYTES[case.loss_kind])
    if case.loss_kind == "chunked":
        issued = Work(7 + 5 * chunks, 9 + 3 * chunks, 4, 1, 2 + chunks, 14 + chunks, moved)
    else:
        issued = Work(10, 0, 18, 25, 0, 38, moved)
    return replace(issued, products=tuple(sorted(products.items())))


# ------------------------------------------------------------ fused layers


def _fused_layers(spec: ModelSpec, case: MemoryCase) -> tuple[Work, Work]:
    """Forward and backward of all layers."""
    tokens, hidden, width, layers = case.tokens, spec.hidden_size, spec.intermediate_size, spec.layers
    query, key_value = spec.attention_heads * spec.head_dim, spec.key_value_heads * spec.head_dim
    offloads = case.checkpointing and case.checkpoint_kind == "offload"
    kind = "none" if not case.checkpointing else "selective" if case.checkpoint_kind == "selective" else "full"
    four_bit = case.weights == "nf4"
    chunks = 1 if kind == "none" else ceil(tokens / case.mlp_chunk_tokens)
    turned = query + key_value
    forward_elements = 3 * width + 4 * hidden + 2 * turned
    backward_elements = 6 * width + 8 * hidden + 2 * turned + 2 * key_value
    if kind != "none":
        backward_elements += 2 * hidden + 2 * query
    if kind == "full":
        backward_elements += (2 if four_bit else 1) * 2 * (hidden + turned)
    unpacked = int(_UNPACKED_BYTES * spec.linear_parameters) if four_bit else 0
    attended = (tokens, spec.attention_heads, spec.head_dim)
    again = ((*attended, _FORWARD_PRODUCTS, 0), layers)
    forward = replace(
        _FORWARD[kind].work(layers, chunks, four_bit=four_bit),
        moved_bytes=2 * layers * tokens * forward_elements + unpacked,
        attention=(again,),
        products=_products(_fused_products(spec, case, kind, chunks, backward=False), layers),
    )
    backward = replace(
        _BACKWARD[kind].work(layers, chunks, four_bit=four_bit),
        moved_bytes=2 * layers * tokens * backward_elements + (unpacked * 5 // 4 if kind == "full" else unpacked),
        attention=(*([again] if kind == "full" else []), ((*attended, _BACKWARD_PRODUCTS, 0), layers)),
        products=_products(_fused_products(spec, case, kind, chunks, backward=True), layers),
    )
    if offloads:
        copied = 2 * tokens * hidden * (layers - 1)
        copies = Work(calls=COPY_CALLS * layers, kernels=layers, moved_bytes=copied, copied_bytes=copied)
        forward, backward = forward.plus(copies), backward.plus(copies)
    return forward, backward


def _fused_products(
    spec: ModelSpec, case: MemoryCase, kind: str, chunks: int, *, backward: bool
) -> Iterator[tuple[int, int, int]]:
    """Rows, inner and columns of each product of a layer."""
    form, rank, hidden = LAYER_FORMS[spec.model_type], case.lora_r, spec.hidden_size
    query, key_value = spec.attention_heads * spec.head_dim, spec.key_value_heads * spec.head_dim

    def rounded(ranks: int) -> int:
        return -(-ranks // 16) * 16

    tokens = case.tokens
    rows = ceil(tokens / chunks)
    qkv = (tokens, hidden, query + 2 * key_value, rounded(len(form.qkv) * rank))
    out = (tokens, query, hidden, rounded(rank))
    gate_up = (rows, hidden, 2 * spec.intermediate_size, rounded(len(form.gate_up) * rank))
    down = (rows, spec.intermediate_size, hidden, rounded(rank))

    def once(group: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int]]:
        count, inputs, outputs, ranks = group
        yield count, inputs, ranks
        yield count, inputs + ranks, outputs

    def apart(group: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int]]:
        count, inputs, outputs, ranks = group
        yield from ((count, inputs, ranks), (count, inputs, outputs), (count, ranks, outputs))

    def gradients(group: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int]]:
        count, inputs, outputs, ranks = group
        yield from ((count, outputs, ranks), (count, outputs + ranks, inputs))
        yield from ((ranks, count, inputs), (outputs, count, ranks))

    if not backward:
        yield from (*once(qkv), *apart(out))
        for _ in range(chunks):
            yield from (*once(gate_up), *once(down))
        return
    yield from (*gradients(qkv), *gradients(out))
    if kind == "full":
        for _ in range(2 if case.weights == "nf4" else 1):
            yield from once(qkv)
    for _ in range(chunks):
        if kind != "none":
            yield from (*once(gate_up), (rows, spec.intermediate_size, rounded(rank)))
        if kind == "full":
            yield from apart((rows, *out[1:]))
        yield from (*gradients(gate_up), *gradients(down))


def _products(shapes: Iterator[tuple[int, int, int]], times: int, element: int = 2) -> tuple[tuple[Product, int], ...]:
    found: Counter[Product] = Counter()
    for shape in shapes:
        found[*shape, element] += times
    return tuple(sorted(found.items()))


# ------------------------------------------------------------ layers of transformers


def _plain_layers(spec: ModelSpec, case: MemoryCase) -> tuple[Work, Work]:
    """Forward and backward of all layers, what a checkpointed layer computes again included."""
    tokens, element = case.tokens, _element(case)
    experts = max(1, spec.experts_per_token)
    linear = spec.layers * len(linear_layers(spec))
    units = linear + spec.layers
    share = (_FULL_SHARE if case.full else 1.0) * (_FP32_SHARE if element == 4 else 1.0)
    wide = tokens * element * (spec.hidden_size + spec.intermediate_size * experts)
    packed = case.weights in ("nf4", "int8")
    attended = (tokens, spec.attention_heads, spec.head_dim)
    masked, row_tokens = (_MASKED, case.length_tokens) if case.bin_tokens is None else (1, 0)

    def part(counts: list[dict[str, float]], products: Iterator[tuple[int, int, int]], attention: list[int]) -> Work:
        calls, engine, kernels, traffic = (
            share * units * sum(one[name] for one in counts) for name in ("calls", "engine", "kernels", "traffic")
        )
        unpacks = units * len(counts) if packed else 0
        there, back = _PACKED_CALLS.get(case.weights, (0, 0))
        library = sum(linear * (back if one is _PLAIN_BACKWARD else there) for one in counts)
        library += CHECKPOINT_CALLS * spec.layers * (_PLAIN_AGAIN in counts)
        moved = wide * traffic + (_UNPACKED_BYTES * spec.linear_parameters * len(counts) if packed else 0)
        return Work(
            views=round(_PLAIN_VIEWS * calls),
            graph_calls=round((1 - _PLAIN_VIEWS) * calls) + library,
            engine_calls=round(engine),
            kernels=round(kernels) + unpacks * _PLAIN_UNPACK_KERNELS,
            moved_bytes=int(moved),
            attention=tuple(((*attended, masked * count, row_tokens), spec.layers) for count in sorted(attention)),
            products=_products(products, spec.layers, element),
        )

    forward = part([_PLAIN_FORWARD], _plain_products(spec, case, backward=False), [_FORWARD_PRODUCTS])
    again = [_PLAIN_AGAIN] if case.checkpointing else []
    backward = part(
        [_PLAIN_BACKWARD, *again],
        _plain_products(spec, case, backward=True),
        [_BACKWARD_PRODUCTS, *([_FORWARD_PRODUCTS] if case.checkpointing else [])],
    )
    if case.dora and not case.full:
        forward = forward.plus(_dora(spec, case, _DORA_FORWARD))
        backward = backward.plus(_dora(spec, case, _DORA_BACKWARD))
        backward = backward.plus(_dora(spec, case, _DORA_FORWARD), int(case.checkpointing))
    return forward, backward


def _dora(spec: ModelSpec, case: MemoryCase, counts: dict[str, int]) -> Work:
    """What it does beside LoRA, in all layers; its products are among the others'."""
    layers, tokens = adapted_layers(spec, case.target_modules), case.tokens
    moved = sum(
        tokens * outs * counts["outputs"] + ins * ins * counts["identity"] + ins * outs * counts["matrix"]
        for _, ins, outs in layers
    )
    units = spec.layers * len(layers)
    return Work(
        views=round(_PLAIN_VIEWS * units * counts["calls"]),
        graph_calls=round((1 - _PLAIN_VIEWS) * units * counts["calls"]),
        engine_calls=units * counts["engine"],
        kernels=units * counts["kernels"],
        moved_bytes=spec.layers * moved,
    )


def _plain_products(spec: ModelSpec, case: MemoryCase, *, backward: bool) -> Iterator[tuple[int, int, int]]:
    """Of a layer; experts, which `linear_layers` leaves out, as one product of what a token goes through."""
    tokens, adapted = case.tokens, {name for name, *_ in adapted_layers(spec, case.target_modules)}
    layers = list(linear_layers(spec))
    if spec.experts:
        gated, width = 2 * spec.intermediate_size, spec.intermediate_size
        rows = spec.experts_per_token
        layers += [("experts", spec.hidden_size, rows * gated), ("experts", rows * width, spec.hidden_size)]
    for name, inputs, outputs in layers:
        has_adapter = not case.full and name in adapted
        if not backward or case.checkpointing:
            yield tokens, inputs, outputs
            if has_adapter:
                yield from ((tokens, inputs, case.lora_r), (tokens, case.lora_r, outputs))
                if case.dora:
                    yield from ((inputs, inputs, case.lora_r), (inputs, case.lora_r, outputs))
        if not backward:
            continue
        yield tokens, outputs, inputs
        if case.full:
            yield outputs, tokens, inputs
        if has_adapter:
            yield from ((tokens, outputs, case.lora_r), (tokens, case.lora_r, inputs))
            yield from ((outputs, tokens, case.lora_r), (case.lora_r, tokens, inputs))
