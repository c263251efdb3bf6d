"""What only a GPU would do, done on meta tensors: attention kernels, autocast, unpacking, the optimizer's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from laras.models.recording import Recorder
from laras.records import HardwareSpec, Precision

# bitsandbytes keeps small tensors' states in fp32. Source: bitsandbytes/optim/optimizer.py, `min_8bit_size`.
_MIN_8BIT_ELEMENTS = 4096

# ------------------------------------------------------------ the optimizer


def record_states(recorder: Recorder, trained: list[tuple[int, nn.Parameter]], optim: str) -> None:
    """States that live on the device through the step; paged ones live in host memory."""
    for layer, parameter in trained:
        recorder.begin("states", 0, layer)
        count = parameter.numel()
        if optim.endswith("8bit") and count >= _MIN_8BIT_ELEMENTS:
            if optim.startswith("paged"):
                sizes = [4 * -(-count // 256)] * 2
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


def record_optimizer(
    recorder: Recorder, trained: list[tuple[int, nn.Parameter]], optim: str, hardware: HardwareSpec
) -> None:
    """What the optimizer's step takes for a moment.

    `adamw_torch` works on lists of all tensors at once on CUDA (foreach): the square roots of all second moments
    live together. The fused and the 8-bit ones write in place. Source: torch/optim/adamw.py `_multi_tensor_adamw`.
    """
    if optim != "adamw_torch":
        return
    if hardware.kind == "cpu":
        recorder.begin("end", 1)
        recorder.give_back(recorder.request(max(p.numel() * p.element_size() for _, p in trained)))
        return
    taken = []
    for layer, parameter in trained:
        recorder.begin("optimizer", 0, layer)
        taken.append(recorder.request(parameter.numel() * parameter.element_size()))
    recorder.begin("end", 1)
    for allocation in taken:
        recorder.give_back(allocation)


# ------------------------------------------------------------ what CUDA would do


@contextmanager
def kernels_of(hardware: HardwareSpec) -> Iterator[None]:
    """Attention takes the kernels of the device planned for, and code that asks for a GPU is told that there is one."""
    from laras.models import attention
    from laras.models.fused import lora

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
        return output

    def dropout(inputs: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        # The GPU's kernel keeps a mask of one byte; on meta it would be a tensor of the input's type.
        return inputs if p == 0 or not training else torch.native_dropout(inputs, p, True)[0]

    with (
        mock.patch.object(functional, "dropout", dropout),
        mock.patch.object(functional, "scaled_dot_product_attention", attend),
        mock.patch.object(attention, "has_varlen_kernel", flash_runs),
        mock.patch.object(lora, "_product", _product),
    ):
        yield


def _product(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """The fp32 result that the GPU's product writes directly."""
    return left_TM.new_empty((left_TM.shape[1], right_TN.shape[1]), dtype=torch.float32)


@contextmanager
def autocast_like_cuda(precision: Precision) -> Iterator[None]:
    """What `torch.autocast` does on CUDA: it has no meta backend.

    Products compute in half precision, with casts of trainable leaves kept until the step ends; layer norms compute in
    fp32. Functions are replaced, since a mode would be off while backward recomputes checkpointed layers.
    """
    low = torch.bfloat16 if precision == "bf16" else torch.float16
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    linear, layer_norm, power = functional.linear, functional.layer_norm, torch.pow

    def lowered(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype is not torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(low)
        if id(tensor) not in kept:
            kept[id(tensor)] = (tensor, tensor.to(low))
        return kept[id(tensor)][1]

    def low_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(lowered(inputs), lowered(weight), lowered(bias))  # type: ignore[arg-type]

    def high_norm(
        inputs: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        wide_weight, wide_bias = (None if one is None else one.float() for one in (weight, bias))
        return layer_norm(inputs.float(), shape, wide_weight, wide_bias, eps)

    def high_power(inputs: Any, exponent: Any) -> Tensor:
        return power(inputs.float() if isinstance(inputs, Tensor) else inputs, exponent)

    was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", low)
    try:
        with (
            mock.patch.object(functional, "linear", low_linear),
            mock.patch.object(functional, "layer_norm", high_norm),
            mock.patch.object(torch, "pow", high_power),
        ):
            yield
    finally:
        torch.set_autocast_enabled("cuda", was[0])
        torch.set_autocast_dtype("cuda", was[1])
