"""What an operation costs a GPU, from its arguments: arithmetic, bytes, and whether it launches anything.

Used while a step is recorded on meta tensors; the kernels of the fused layers, which meta tensors skip, tell what they
would have done through `pointwise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from laras.planning.work import Attention, WorkCounter

_aten: Any = torch.ops.aten
# Take no time on the device: they make room, or another view.
_EMPTY = frozenset(
    [
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
        _aten._unsafe_view.default,
        _aten._reshape_alias.default,
        _aten.lift_fresh.default,
    ]
)


def count_operation(counter: WorkCounter, func: Any, args: tuple[Any, ...], out: Any) -> None:
    """Adds an operation to the counter."""
    is_view = func in _EMPTY or func.is_view
    counter.called(in_graph=torch.is_grad_enabled(), by_engine=_is_engine(), is_view=is_view)
    if is_view:
        return
    known = _KNOWN.get(func)
    if known is not None:
        known(counter, *args)
        return
    attention = _ATTENTION.get(func)
    if attention is not None:
        counter.attended(*attention(args))
        return
    product = _PRODUCTS.get(func.overloadpacket)
    if product is not None:
        left, right = args[product], args[product + 1]
        batch = left.shape[0] if left.dim() == 3 else 1
        rows, inner = left.shape[-2:]
        counter.multiplied(batch, rows, inner, right.shape[-1], left.element_size())
        return
    counter.launched(_moved_bytes([*tree_leaves(args), *tree_leaves(out)]))


def _is_engine() -> bool:
    """Whether autograd's engine issues the operation: a checkpointed layer runs again, and a backward by hand runs,
    from Python."""
    if torch.is_grad_enabled():
        return False
    node = torch._C._current_autograd_node()
    return node is not None and not isinstance(node, torch.autograd.function.BackwardCFunction)


def register_work(op: Any, count: Callable[..., None]) -> None:
    """Tells what an operation of a library does inside: `count` gets the counter and the operation's arguments."""
    _KNOWN[op] = count


def pointwise(counter: WorkCounter, tensors: Iterable[Tensor | None]) -> None:
    """Adds a kernel of the product's own that reads or writes each of the tensors once."""
    counter.called()
    counter.launched(_moved_bytes(tensors), compiled=True)


def _moved_bytes(leaves: Iterable[Any]) -> int:
    """Bytes of the tensors, what is broadcast counted once."""
    total = 0
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            whole = leaf.numel() * leaf.element_size()
            total += min(whole, leaf.untyped_storage().nbytes()) if 0 in leaf.stride() else whole
    return total


_KNOWN: dict[Any, Callable[..., None]] = {}
_PRODUCTS: dict[Any, int] = {
    _aten.mm: 0,
    _aten.bmm: 0,
    _aten.addmm: 1,
    _aten.addmm_: 1,
    _aten.baddbmm: 1,
}


# Products that a token has with each that it attends to, forward and backward: causal attention leaves half of the
# square out, a mask does not.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def _dense(query: Tensor, products: int, *, is_masked: bool) -> Attention:
    batch, heads, tokens, channels = query.shape
    return batch * tokens, heads, channels, products * (2 if is_masked else 1), tokens if is_masked else 0


def _flash_forward(args: tuple[Any, ...]) -> Attention:
    is_causal = len(args) > 4 and args[4]
    return _dense(args[0], FORWARD_PRODUCTS, is_masked=not is_causal)


def _flash_backward(args: tuple[Any, ...]) -> Attention:
    return _dense(args[1], BACKWARD_PRODUCTS, is_masked=False)


def _efficient_forward(args: tuple[Any, ...]) -> Attention:
    return _dense(args[0], FORWARD_PRODUCTS, is_masked=args[3] is not None or not args[6])


def _efficient_backward(args: tuple[Any, ...]) -> Attention:
    return _dense(args[1], BACKWARD_PRODUCTS, is_masked=args[4] is not None)


def _varlen(query: Tensor, products: int) -> Attention:
    tokens, heads, channels = query.shape
    return tokens, heads, channels, products, 0


_ATTENTION: dict[Any, Any] = {
    _aten._scaled_dot_product_flash_attention.default: _flash_forward,
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention.default: _efficient_forward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}


def register_varlen() -> None:
    """Tells the work of torch's kernel for packed documents; importing it takes seconds, so only where it runs."""
    from torch.nn.attention import varlen  # noqa: F401 - defines the operations

    _ATTENTION[torch.ops.torch_attn._varlen_attn.default] = lambda args: _varlen(args[0], FORWARD_PRODUCTS)
    _ATTENTION[torch.ops.torch_attn._varlen_attn_backward.default] = lambda args: _varlen(args[1], BACKWARD_PRODUCTS)
