"""What only a GPU would do, done on meta tensors: attention kernels, autocast, unpacking, the optimizer's memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from laras.models.counting import BACKWARD_PRODUCTS, FORWARD_PRODUCTS, pointwise
from laras.models.recording import Recorder
from laras.models.step import ExecutionPath
from laras.planning.step_forms import COPY_CALLS, UPDATE_8BIT_BYTES, UPDATE_8BIT_CALLS
from laras.planning.work import WorkCounter
from laras.records import HardwareSpec, Precision

# bitsandbytes keeps small tensors' states in fp32. Source: bitsandbytes/optim/optimizer.py, `min_8bit_size`.
_MIN_8BIT_ELEMENTS = 4096
_MIN_PAGED_ELEMENTS = 100_000  # smaller states are not paged; the same file, `get_state_buffer`

# How often a kernel of the fused layers goes over its tensors, where not once: in place, or for a maximum first.
_PASSES = {"swiglu_backward_": 2, "cross_entropy_": 3}

# ------------------------------------------------------------ the optimizer


def record_states(recorder: Recorder, trained: list[tuple[int, nn.Parameter]], optim: str) -> dict[int, int]:
    """States that live on the device through the step; bytes of each layer's paged ones, outside the allocator."""
    paged: dict[int, int] = defaultdict(int)
    for layer, parameter in trained:
        recorder.begin("states", 0, layer)
        count = parameter.numel()
        if optim.endswith("8bit") and count >= _MIN_8BIT_ELEMENTS:
            if optim.startswith("paged") and count >= _MIN_PAGED_ELEMENTS:
                sizes = [4 * -(-count // 256)] * 2
                paged[layer] += 2 * count
            else:
                sizes = [count, count, 4 * -(-count // 256), 4 * -(-count // 256)]
        elif optim.endswith("8bit"):
            sizes = [4 * count, 4 * count]
        else:
            sizes = [4, count * parameter.element_size(), count * parameter.element_size()]
            if optim == "adamw_torch":
                sizes = sizes[1:]  # the step's counter stays on the host
        for size in sizes:
            recorder.request(size)
    return dict(paged)


def record_optimizer(
    recorder: Recorder, trained: list[tuple[int, nn.Parameter]], optim: str, hardware: HardwareSpec
) -> None:
    """What the optimizer's step takes for a moment.

    `adamw_torch` works on lists of all tensors at once on CUDA (foreach): the square roots of all second moments
    live together. The fused and the 8-bit ones write in place. Source: torch/optim/adamw.py `_multi_tensor_adamw`.
    """
    taken = []
    for layer, parameter in trained:
        recorder.begin("optimizer", 0, layer)
        _count_update(recorder.counter, parameter, optim)
        if optim == "adamw_torch" and hardware.kind == "cuda":
            taken.append(recorder.request(parameter.numel() * parameter.element_size()))
    recorder.begin("optimizer")
    if optim == "adamw_torch" and hardware.kind == "cpu":  # one tensor after the other
        taken.append(recorder.request(max(p.numel() * p.element_size() for _, p in trained)))
    for allocation in taken:
        recorder.give_back(allocation)


def _count_update(counter: WorkCounter, parameter: nn.Parameter, optim: str) -> None:
    """Traffic of one parameter's update, clipping included; the calls are those that go parameter by parameter."""
    count, size = parameter.numel(), parameter.element_size()
    if optim.endswith("8bit"):
        counter.called(UPDATE_8BIT_CALLS, in_graph=True)
        counter.launched(count * UPDATE_8BIT_BYTES)
        counter.waited()
    else:
        # A kernel for many parameters: seven tensors; or a list operation after the other, some twenty.
        counter.called()
        counter.moved(count * size * (7 if optim == "adamw_torch_fused" else 20))


# ------------------------------------------------------------ what CUDA would do


@contextmanager
def kernels_of(hardware: HardwareSpec, recorder: Recorder) -> Iterator[None]:
    """Attention takes the kernels of the device planned for, and code that asks for a GPU is told that there is one."""
    from laras.models import attention
    from laras.models.fused import lora

    def product(left_TM: Tensor, right_TN: Tensor) -> Tensor:
        """The fp32 result that the GPU's product writes directly."""
        (tokens, rows), columns = left_TM.shape, right_TN.shape[1]
        recorder.counter.multiplied(1, rows, tokens, columns, left_TM.element_size())
        return left_TM.new_empty((rows, columns), dtype=torch.float32)

    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        """PEFT turns it off for adapters of experts, by the name of the device; meta has none to turn off."""
        return nullcontext() if device_type == "meta" else torch.amp.autocast(device_type, *args, **options)

    capability = hardware.compute_capability or (0, 0)
    original = functional.scaled_dot_product_attention

    def flash_runs(query: Tensor) -> bool:
        return hardware.kind == "cuda" and capability >= (8, 0) and query.element_size() == 2 and query.shape[-1] <= 256

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is None and flash_runs(query):
            op: Any = torch.ops.aten._scaled_dot_product_flash_attention
            result: Tensor = op(query, key, value, dropout_p, is_causal, scale=scale)[0]
            return result
        if hardware.kind == "cpu" or enable_gqa or query.shape[-1] % 8:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        bias = attn_mask
        if bias is not None:
            if bias.dtype is torch.bool:
                bias = torch.empty(bias.shape, dtype=query.dtype, device=query.device)
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        efficient: Any = torch.ops.aten._scaled_dot_product_efficient_attention
        grad = query.requires_grad or key.requires_grad
        output: Tensor = efficient(query, key, value, bias, grad, dropout_p, is_causal, scale=scale)[0]
        # On an H100 the result in half precision lies in memory as the query does (as that of cuDNN's kernel would),
        # not token by token, so that the next product gets a copy. Measured on GPT-NeoX; in fp32 it is not so.
        as_query = capability >= (9, 0) and query.element_size() == 2 and query.is_contiguous()
        return output.contiguous() if as_query else output

    def dropout(inputs: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        # The GPU's kernel keeps a mask of one byte; on meta it would be a tensor of the input's type.
        return inputs if p == 0 or not training else torch.native_dropout(inputs, p, True)[0]

    with (
        mock.patch.object(torch, "autocast", autocast),
        mock.patch.object(functional, "dropout", dropout),
        mock.patch.object(functional, "scaled_dot_product_attention", attend),
        mock.patch.object(attention, "has_varlen_kernel", flash_runs),
        mock.patch.object(lora, "_product", product),
    ):
        yield


@contextmanager
def counted_kernels(recorder: Recorder) -> Iterator[None]:
    """The fused layers' own kernels, which do nothing on meta tensors, tell the recorder what they would have done."""
    from laras.models.fused import kernels, layer, lora, loss, model, offload

    def started(hidden: Tensor) -> None:
        recorder.counter.called(COPY_CALLS)
        recorder.counter.copied(hidden.numel() * hidden.element_size())

    def told(name: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            touched = [one for one in args if isinstance(one, Tensor) and one.dim() > 1]
            pointwise(recorder.counter, touched * _PASSES.get(name, 1))
            return original(*args)

        return call

    def attended(original: Any, products: int, query: int) -> Any:
        def call(*args: Any) -> Any:
            recorder.counter.called()
            tokens, heads, channels = args[query].shape
            recorder.counter.attended(tokens, heads, channels, products, 0)
            wanted = (args[0], args[query + 3]) if query else ()
            copied = [one for one in wanted if not one.is_contiguous()]  # by FlashAttention: a gradient and an output
            taken = [recorder.request(one.numel() * one.element_size()) for one in copied]
            result = original(*args)
            for one in taken:
                recorder.give_back(one)
            return result

        return call

    patches: list[tuple[Any, str, Any]] = [
        (layer, name, attended(getattr(layer, name), products, query))
        for name, products, query in (
            ("attention", FORWARD_PRODUCTS, 0),
            ("attention_backward", BACKWARD_PRODUCTS, 1),
        )
    ]
    patches.append((offload, "started", started))
    for module in (layer, lora, loss, model):
        for name, original in vars(kernels).items():
            if name.endswith("_") and not name.startswith("_") and getattr(module, name, None) is original:
                patches.append((module, name, told(name, original)))
    with ExitStack() as stack:
        for module, name, replacement in patches:
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield


# Products that autocast lowers, as functions and as methods. Source: torch 2.13, `aten/src/ATen/autocast_mode.h`.
_LOWERED = ("matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm")


@contextmanager
def autocast_like_cuda(precision: Precision) -> Iterator[None]:
    """What `torch.autocast` does on CUDA: it has no meta backend.

    Products compute in half precision, with casts of trainable leaves kept until the forward pass ends, or that of a
    layer which runs again; layer norms and softmax compute in fp32. Functions are replaced, since a mode would be off
    while backward recomputes checkpointed layers.
    """
    low = torch.bfloat16 if precision == "bf16" else torch.float16
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    layer_norm, softmax, power = functional.layer_norm, functional.softmax, torch.pow

    def lowered(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype is not torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(low)
        if id(value) not in kept:
            kept[id(value)] = (value, value.to(low))
        return kept[id(value)][1]

    def in_low(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def product(*inputs: Any, **options: Any) -> Tensor:
            return function(*map(lowered, inputs), **{name: lowered(value) for name, value in options.items()})

        return product

    def in_low_if_mixed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Rotations multiply two fp32 tensors where autocast is off, which cannot be seen on the meta device."""
        product = in_low(function)

        def mixed(*inputs: Any, **options: Any) -> Tensor:
            tensors = [one for one in (*inputs, *options.values()) if isinstance(one, Tensor)]
            chosen = product if any(one.dtype is low for one in tensors) else function
            return chosen(*inputs, **options)

        return mixed

    def high_norm(
        inputs: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        wide_weight, wide_bias = (None if one is None else one.float() for one in (weight, bias))
        return layer_norm(inputs.float(), shape, wide_weight, wide_bias, eps)

    def high_softmax(
        inputs: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> Tensor:
        return softmax(inputs, dim, dtype=dtype or torch.float32)

    def high_power(inputs: Any, exponent: Any) -> Tensor:
        return power(inputs.float() if isinstance(inputs, Tensor) else inputs, exponent)

    @contextmanager
    def computing(*_: Any) -> Iterator[None]:
        yield
        kept.clear()

    autocast_dtype = torch.get_autocast_dtype

    def dtype_of(device_type: str) -> torch.dtype:
        return low if device_type == "meta" else autocast_dtype(device_type)

    was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", low)
    products = [(Tensor, "__matmul__"), *((place, name) for place in (torch, Tensor) for name in _LOWERED)]
    try:
        with ExitStack() as stack:
            for name in ("linear", "conv1d", "scaled_dot_product_attention"):
                stack.enter_context(mock.patch.object(functional, name, in_low(getattr(functional, name))))
            for place, name in products:
                stack.enter_context(mock.patch.object(place, name, in_low_if_mixed(getattr(place, name))))
            stack.enter_context(mock.patch.object(functional, "layer_norm", high_norm))
            stack.enter_context(mock.patch.object(functional, "softmax", high_softmax))
            stack.enter_context(mock.patch.object(torch, "pow", high_power))
            stack.enter_context(mock.patch.object(ExecutionPath, "computing", computing))
            stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", kept.clear))
            stack.enter_context(mock.patch.object(torch, "get_autocast_dtype", dtype_of))
            yield
    finally:
        torch.set_autocast_enabled("cuda", was[0])
        torch.set_autocast_dtype("cuda", was[1])
