"""Linear layers that share an input, with their adapters, as one matrix product each way.

One storage of shape (N + R, K + R) holds the stacked weights W (N, K), to their right the scaled B factors (N, R), and
below them the A factors (R, K):

    forward   y  = [x, x A^T] [W, sB]^T
    backward  dx = [dy, dy sB] [W; A]

so that an adapter costs a few more columns of a product that runs anyway. The modules' own weights are views into the
storage; 4-bit weights are dequantised into one that exists from `load` to `unload`, so that where attention's backward
takes its most there is none for the feed-forward part. Shapes: T tokens, K inputs, N outputs, R ranks together, rounded
up to 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from laras.models.fused import variant
from laras.models.fused.kernels import unpack_4bit_

ADAPTER = "default"


class _OptimizerSteps:
    """How many steps all optimizers have taken: fused and 8-bit ones change weights without raising their version."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, optimizer: Any, arguments: Any, keywords: Any) -> None:
        self.count += 1


_STEPS = _OptimizerSteps()


class LoraGroup:
    """Adapted linear layers with one input.

    Args:
        layers: peft's LoRA layers, each of one plain adapter.
        dtype: Of the arithmetic.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        self.layers, self.variant = list(layers), variant.CHOSEN
        bases = [layer.get_base_layer() for layer in layers]
        self.adapters: list[nn.Parameter] = []
        for layer in layers:
            self.adapters += [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
        self.inputs: int = bases[0].in_features
        self.row_starts = _starts([base.out_features for base in bases])
        self.rank_starts = _starts([layer.lora_A[ADAPTER].weight.shape[0] for layer in layers])
        self.outputs, self.ranks = self.row_starts[-1], -(-self.rank_starts[-1] // 16) * 16
        self._versions: tuple[int, ...] | None = None
        self._is_quantized = getattr(bases[0].weight, "quant_state", None) is not None
        device = bases[0].weight.device
        biases = [base.bias for base in bases]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = zip(biases, bases, strict=True)
            self.bias = torch.cat(
                [torch.zeros(o.out_features, dtype=dtype, device=device) if b is None else b.data for b, o in parts]
            )
        shape = (self.outputs + self.ranks, self.inputs + self.ranks)
        self._shape, self._nothing = shape, torch.empty(0, dtype=dtype, device=device)
        with torch.no_grad():
            if self._is_quantized:
                self.storage = self._nothing
                self._factors = torch.zeros(self.ranks, self.inputs + self.outputs, dtype=dtype, device=device)
                self._is_one_launch = self.variant.unpack_kernel and self._launches()
            else:
                self.storage = torch.zeros(shape, dtype=dtype, device=device)
                for base, rows in zip(bases, self._rows(), strict=True):
                    view = self.storage[rows, : self.inputs]
                    view.copy_(base.weight)
                    base.weight.data = view
        self._places = [self._place(*place) for place in zip(self._rows(), self._ranks(), strict=True)]

    @property
    def is_quantized(self) -> bool:
        """The weights are 4-bit ones, which `load` unpacks."""
        return self._is_quantized

    def _rows(self) -> list[slice]:
        return [slice(a, b) for a, b in zip(self.row_starts, self.row_starts[1:], strict=False)]

    def _ranks(self) -> list[slice]:
        return [slice(a, b) for a, b in zip(self.rank_starts, self.rank_starts[1:], strict=False)]

    def refresh(self, *, always: bool = False) -> None:
        """Copies the adapters beside the weights, in the arithmetic's type, when they have changed."""
        self.unload()  # what a step that broke off left behind
        versions = (_STEPS.count, *(parameter._version for parameter in self.adapters))
        if not always:  # copies that are captured are not made before the graph is replayed, if it ever is
            if versions == self._versions:
                return
            self._versions = versions
        with torch.no_grad():
            for index, (below, beside) in enumerate(self._places):
                b = self.adapters[2 * index + 1]
                below.copy_(self.adapters[2 * index])
                torch.mul(b.t() if self._is_quantized else b, self._scale(index), out=beside)

    def _place(self, rows: slice, ranks: slice) -> tuple[Tensor, Tensor]:
        """Views of where a layer's adapter goes; cutting them out anew takes longer than the copy."""
        if self._is_quantized:
            return self._factors[ranks, : self.inputs], self._factors[ranks, self.inputs :][:, rows]
        below = self.storage[self.outputs :, : self.inputs][ranks]
        return below, self.storage[rows, self.inputs :][:, ranks]

    def load(self) -> None:
        """Makes the storage hold this group's weights until `unload`; work for 4-bit weights only."""
        if not self._is_quantized or self.storage is not self._nothing:
            return
        self.storage = self._nothing.new_empty(self._shape)
        if self._is_one_launch:
            self._launch(self.storage)
        else:
            self._unpack(self.storage)

    def _weights(self) -> list[Any]:
        return [layer.get_base_layer().weight for layer in self.layers]

    def _launch(self, storage: Tensor) -> None:
        weights = self._weights()
        states = [weight.quant_state for weight in weights]
        unpack_4bit_(storage, self._factors, states, self.row_starts, *[weight.data for weight in weights])

    def _unpack(self, storage: Tensor) -> None:
        from bitsandbytes.functional import dequantize_4bit

        for weight, rows in zip(self._weights(), self._rows(), strict=True):
            storage[rows, : self.inputs].copy_(dequantize_4bit(weight.data, weight.quant_state))
        storage[self.outputs :, : self.inputs].copy_(self._factors[:, : self.inputs])
        storage[: self.outputs, self.inputs :].copy_(self._factors[:, self.inputs :].t())

    def _launches(self) -> bool:
        """Whether one launch unpacks this group's weights; on meta tensors, as on a GPU."""
        return self._nothing.is_meta or (self._nothing.is_cuda and self._launch_agrees())

    def _launch_agrees(self) -> bool:
        """Whether it does so bit for bit as bitsandbytes.

        Tried on the weights themselves, since a kernel that is wrong on a card would train another model.
        """
        from laras.models.fused.triton_nf4 import unpack_refusal

        if unpack_refusal([weight.quant_state for weight in self._weights()], self.inputs) is not None:
            return False
        found, expected = (self._nothing.new_zeros(self._shape) for _ in range(2))
        values = torch.arange(self._factors.numel(), device=self._factors.device) % 251
        self._factors.copy_(values.view(self._factors.shape))
        try:
            self._launch(found)
            self._unpack(expected)
            return torch.equal(found, expected)
        except Exception:  # noqa: BLE001 - a compiler can fail in any way
            return False
        finally:
            self._factors.zero_()

    def unload(self) -> None:
        """Gives the memory of dequantised weights back."""
        if self._is_quantized:
            self.storage = self._nothing

    @property
    def a(self) -> Tensor:
        """A (R, K), while weights are loaded."""
        return self.storage[self.outputs :, : self.inputs]

    @property
    def scaled_b(self) -> Tensor:
        """sB (N, R), while weights are loaded."""
        return self.storage[: self.outputs, self.inputs :]

    def new_input(self, like: Tensor) -> Tensor:
        """An uninitialised (T, K + R) buffer; its first K columns are for the input."""
        return like.new_empty(like.shape[0], self.inputs + self.ranks)

    def forward(self, buffer: Tensor, out: Tensor) -> None:
        """`out` (T, N) of an input in the first K columns of `buffer`, whose last R columns become x A^T."""
        torch.mm(buffer[:, : self.inputs], self.a.t(), out=buffer[:, self.inputs :])
        weight = self.storage[: self.outputs].t()
        if self.bias is None:
            torch.mm(buffer, weight, out=out)
        else:
            torch.addmm(self.bias, buffer, weight, out=out)

    def add_forward(self, input_TK: Tensor, residual: Tensor, xa: Tensor) -> Tensor:
        """Output plus residual of an input that lies outside a buffer; `xa` (T, R) becomes x A^T."""
        torch.mm(input_TK, self.a.t(), out=xa)
        out = torch.addmm(residual, input_TK, self.storage[: self.outputs, : self.inputs].t())
        out.addmm_(xa, self.scaled_b.t())
        return out if self.bias is None else out.add_(self.bias)

    def backward(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient to the input, and dy sB, of a gradient in the first N columns of a (T, N + R) buffer."""
        dyb = self.rank_gradient(buffer)
        return self.input_gradient(buffer, slice(0, self.inputs)), dyb

    def rank_gradient(self, buffer: Tensor) -> Tensor:
        """Fills the last R columns of such a buffer, and returns them: dy sB."""
        dyb = buffer[:, self.outputs :]
        torch.mm(buffer[:, : self.outputs], self.scaled_b, out=dyb)
        return dyb

    def input_gradient(self, buffer: Tensor, columns: slice) -> Tensor:
        """Gradient to some columns of the input, of such a buffer whose last columns are filled."""
        return torch.mm(buffer, self.storage[:, : self.inputs][:, columns])

    def add_gradients(self, sums: AdapterSums, x: Tensor, xa: Tensor, dy: Tensor, dyb: Tensor) -> None:
        """Adds some tokens' part of the adapters' gradients."""
        if self.variant.grouped_sums:
            sums.add(0, _product(dyb, x))
            sums.add(1, _product(dy, xa))
            return
        below = _product(dyb, x)
        for index, (rows, ranks) in enumerate(zip(self._rows(), self._ranks(), strict=True)):
            sums.add(2 * index, below[ranks])
            sums.add(2 * index + 1, _product(dy[:, rows], xa[:, ranks]).mul_(self._scale(index)))

    def gradients(self, sums: AdapterSums) -> list[Tensor | None]:
        """The adapters' gradients, in float32 and in the order of `adapters`."""
        if not self.variant.grouped_sums:
            return [sums.parts.get(index) for index in range(len(self.adapters))]
        below, beside = sums.parts.pop(0), sums.parts.pop(1)
        found: list[Tensor | None] = []
        for index, (rows, ranks) in enumerate(zip(self._rows(), self._ranks(), strict=True)):
            found += [below[ranks], beside[rows, ranks] * self._scale(index)]
        return found

    def _scale(self, index: int) -> float:
        return float(self.layers[index].scaling[ADAPTER])


@dataclass
class AdapterSums:
    """Sums over chunks of tokens, in float32."""

    parts: dict[int, Tensor] = field(default_factory=dict)

    def add(self, place: int, part: Tensor) -> None:
        """Adds one tensor; the first of a place is kept."""
        old = self.parts.get(place)
        self.parts[place] = part if old is None else old.add_(part)


def _product(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """`left^T right` in float32."""
    if left_TM.dtype == torch.float32 or not left_TM.is_cuda:
        return torch.mm(left_TM.t(), right_TN).float()
    return torch.mm(left_TM.t(), right_TN, out_dtype=torch.float32)


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts
