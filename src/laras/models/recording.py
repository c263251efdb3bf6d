"""Follows every tensor of a computation on meta tensors: when its memory is taken, and when it is given back.

Meta tensors have shapes and no data, so a step of any model runs in a second without weights or a GPU, through the very
code that trains. What a CUDA kernel allocates inside one operation is invisible here and is added by formula; what
depends on data (which tokens carry loss) is taken at its largest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laras.errors import LarasError
from laras.models import counting
from laras.models.counting import count_operation
from laras.models.meta_results import MetaResults
from laras.planning.depth import Repeat
from laras.planning.step_forms import CHECKPOINT_CALLS
from laras.planning.trace import Key, Segment, StepTrace
from laras.planning.work import WorkCounter

_aten: Any = torch.ops.aten
# A layer that loops over positions in Python would take minutes; hundreds of layers of experts stay below.
_MOST_ALLOCATIONS = 300_000
_MOST_OF_A_LAYER = 1_000  # requests and frees of its forward; layers without a loop have some 200


class LongLayer(LarasError):
    """A layer does so much that it may loop over positions in Python, as where a fused scan is not installed."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records allocations and frees, cut into the segments of a step.

    Args:
        layers: The decoder's layers, in order.
        ends_early: Whether a layer that may loop over positions ends it, with `LongLayer`.
    """

    def __init__(self, layers: Iterable[nn.Module], *, ends_early: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ends_early = ends_early
        self._segments: list[tuple[Key, list[int], WorkCounter]] = []
        self._live: dict[int, tuple[Any, int]] = {}
        self._allocations = 0
        self._kinds: tuple[str, str, str | None, int] | None = None
        self._in_backward = False
        self._layers = list(layers)
        self._hooks: list[Any] = []
        self._results = MetaResults()
        self.begin("weights")

    def begin(self, kind: str, index: int = 0, layer: int = -1) -> None:
        """Starts a segment; one that was left is taken up again only if nothing came between."""
        key = (kind, index, layer)
        if self._segments and self._segments[-1][0] == key:
            return
        self._segments.append((key, [], WorkCounter()))

    @property
    def place(self) -> Key:
        """The present segment's."""
        return self._segments[-1][0]

    @property
    def counter(self) -> WorkCounter:
        """The work of the present segment."""
        return self._segments[-1][2]

    def record_owned(self, kind: str, tensors: Iterable[tuple[int, Tensor]]) -> None:
        """Tensors that exist already, each with the layer that owns it (-1: none)."""
        for layer, tensor in tensors:
            self.begin(kind, 0, layer)
            self.track(tensor)

    def request(self, nbytes: int) -> int:
        """Takes memory that no tensor stands for; returns what `give_back` wants."""
        if nbytes <= 0:
            return 0
        self._allocations += 1
        if self._allocations > _MOST_ALLOCATIONS:
            raise RuntimeError(f"one step takes more than {_MOST_ALLOCATIONS:,} allocations")
        (kind, _, layer), events, _ = self._segments[-1]
        is_forward = self._kinds is not None and kind == self._kinds[0] and layer >= 0
        if self._ends_early and is_forward and len(events) > _MOST_OF_A_LAYER:
            raise LongLayer(f"layer {layer} may loop over positions")
        events.append(nbytes)
        return self._allocations

    def give_back(self, allocation: int) -> None:
        """Frees what `request` took."""
        if allocation:
            self._segments[-1][1].append(-allocation)

    def track(self, tensor: Tensor) -> None:
        """Follows a tensor's storage from now to its end."""
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._live or nbytes == 0:
            return
        allocation = self.request(nbytes)

        def died(_: Any) -> None:
            self._died(key)

        self._live[key] = (weakref.ref(storage, died), allocation)

    def watch(self, forward: str, loss: str, backward: str | None, index: int = 0) -> None:
        """From now on, layers begin segments of these kinds."""
        self.stop_watching()
        self._kinds = (forward, loss, backward, index)
        last = len(self._layers) - 1
        for number, layer in enumerate(self._layers):
            self._hooks.append(layer.register_forward_pre_hook(self._entering(number)))
            self._hooks.append(layer.register_forward_hook(self._leaving(number, number == last)))

    def stop_watching(self) -> None:
        """Layers begin no segments any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._kinds = None
        self._in_backward = False

    def entered(self, number: int) -> None:
        """A layer's forward begins; within backward it is a checkpointed layer that runs again."""
        if self._kinds is None:
            return
        if self._in_backward:
            self.counter.called(CHECKPOINT_CALLS, in_graph=True)
        else:
            self.begin(self._kinds[0], self._kinds[3], number)

    def left(self, number: int, output: Any, *, is_last: bool) -> None:
        """A layer's forward ends; its backward begins when the gradient of its output is there."""
        if self._kinds is None or self._in_backward:
            return
        _, loss, backward, index = self._kinds
        hidden = output[0] if isinstance(output, tuple) else output
        if backward is not None and isinstance(hidden, Tensor) and hidden.requires_grad:

            def grad_arrived(_: Tensor) -> None:
                self._in_backward = True
                self.begin(backward, index, number)

            hidden.register_hook(grad_arrived)  # type: ignore[no-untyped-call]
        if is_last:
            self.begin(loss, index)

    def _entering(self, number: int) -> Callable[..., None]:
        return lambda *_: self.entered(number)

    def _leaving(self, number: int, is_last: bool) -> Callable[..., None]:
        return lambda module, inputs, output: self.left(number, output, is_last=is_last)

    def trace(self, paged: Mapping[int, int], repeat: Repeat | None = None) -> StepTrace:
        """What was recorded, the bytes of each layer's paged optimizer states, and the layers that stand for more."""
        segments = [
            Segment(*key, tuple(events), counter.total())
            for key, events, counter in self._segments
            if events or counter.is_used
        ]
        return StepTrace(len(self._layers), tuple(segments), tuple(sorted(paged.items())), repeat)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation, or answers for it where meta tensors cannot, and follows what it returns."""
        kwargs = kwargs or {}
        handler = _DATA_DEPENDENT.get(func)
        hidden = _HIDDEN_BYTES.get(func)
        taken = self.request(hidden(*args, **kwargs)) if hidden else 0
        out = NotImplemented if handler is None else handler(*args, **kwargs)
        if out is NotImplemented:
            out = self._results.of(func, args, kwargs)
        count_operation(self.counter, func, args, out)
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.track(leaf)
        self.give_back(taken)
        return out

    def _died(self, key: int) -> None:
        entry = self._live.pop(key, None)
        if entry is not None:
            self.give_back(entry[1])


# ------------------------------------------------------------ what depends on data


def _item(tensor: Tensor, **_: Any) -> bool | int:
    # A branch on data in a model asks whether rows are whole or unpacked; the answer that costs memory is no.
    return False if tensor.dtype is torch.bool else 1


def _nonzero(tensor: Tensor, **_: Any) -> Tensor:
    return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)


def _index(tensor: Tensor, indices: list[Tensor | None], **_: Any) -> Any:
    """Boolean masks select everything."""
    masks = [one for one in indices if one is not None and one.dtype is torch.bool]
    if not masks:
        return NotImplemented
    if len(indices) == 1:
        mask = masks[0]
        return tensor.new_empty((mask.numel(), *tensor.shape[mask.dim() :]))
    return NotImplemented


_DATA_DEPENDENT: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: _item,
    _aten.nonzero.default: _nonzero,
    _aten.index.Tensor: _index,
}


# ------------------------------------------------------------ what kernels allocate inside


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _flash_head_size(channels: int) -> int:
    return _round_up(channels, 32) if channels <= 128 else 256 if channels > 192 else 192


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """fp32 accumulator of dq, row sums, and dk/dv expanded to the query's heads.

    Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp `mha_bwd`; measured.
    """
    batch, heads, tokens, channels = query.shape
    rows = _round_up(tokens, 128)
    taken = batch * heads * rows * (_flash_head_size(channels) + 1) * 4
    if key.shape[1] != heads:
        taken += 2 * batch * heads * key.shape[2] * channels * key.element_size()
    return taken


def _varlen_backward(grad: Tensor, query: Tensor, key: Tensor, *rest: Any, **__: Any) -> int:
    """As `_flash_backward`, for packed documents, each padded to 128 rows.

    Source: the same file, `mha_varlen_bwd`.
    """
    tokens, heads, channels = query.shape
    documents = next((one.numel() - 1 for one in rest if isinstance(one, Tensor) and one.dtype is torch.int32), 1)
    rows = tokens + 128 * documents
    taken = heads * rows * (_flash_head_size(channels) + 1) * 4
    if key.shape[1] != heads:
        taken += 2 * key.shape[0] * heads * channels * key.element_size()
    return taken


def _efficient_backward(grad: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """fp32 accumulators for dk and dv where half precision needs them, and the row sums.

    Source: aten/src/ATen/native/transformers/cuda/attention_backward.cu.
    """
    batch, heads, tokens, channels = query.shape
    return batch * heads * _round_up(tokens, 32) * 4 + (
        2 * batch * heads * key.shape[2] * channels * 4 if query.element_size() == 2 and channels > 64 else 0
    )


_HIDDEN_BYTES: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}


def register_operation(op: Any, handler: Callable[..., Any]) -> None:
    """Tells the recorder what an operation without shapes returns, from its arguments."""
    _DATA_DEPENDENT[op] = handler


def register_kernel_memory(op: Any, formula: Callable[..., int]) -> None:
    """Tells the recorder what a kernel of the product allocates inside, from the operation's arguments."""
    _HIDDEN_BYTES[op] = formula


def register_varlen() -> None:
    """Tells what torch's kernel for packed documents does and takes; see `laras.models.counting.register_varlen`."""
    counting.register_varlen()
    register_kernel_memory(torch.ops.torch_attn._varlen_attn_backward.default, _varlen_backward)
