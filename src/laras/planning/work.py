"""What a recorded step asks of a device besides memory: arithmetic, traffic, launches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, TypeVar

Product = tuple[int, int, int, int]  # rows, inner, columns, bytes of an element; a batch multiplies its count
# Tokens, heads, channels, products of a token with each that it attends to; and how many tokens there are in a row
# whose square is gone through whole, under a mask, or 0 where the kernel leaves out what is masked.
Attention = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Work:
    """Of a stretch of a step.

    Attributes:
        views: Operations that Python issues and that only make room, or another view of it.
        calls: Others that Python issues, where autograd does not follow them.
        graph_calls: Others that Python's modules issue while autograd follows them.
        engine_calls: All that autograd's engine issues by itself, in backward.
        compiled: Of the kernels, those that go through the launcher of a compiler.
        kernels: Operations that run something on the device, matrix products apart.
        moved_bytes: Read and written by them.
        waits: How often the host waits for the device.
        attention: Calls of the attention kernels and how many there are of each.
        products: Matrix products and how many there are of each.
        copied_bytes: Copied to main memory or back while the device computes.
    """

    views: int = 0
    calls: int = 0
    graph_calls: int = 0
    engine_calls: int = 0
    compiled: int = 0
    kernels: int = 0
    moved_bytes: int = 0
    waits: int = 0
    attention: tuple[tuple[Attention, int], ...] = ()
    products: tuple[tuple[Product, int], ...] = ()
    copied_bytes: int = 0

    @property
    def _numbers(self) -> list[Any]:  # a list of `Any`, as arguments in their order
        calls = [self.views, self.calls, self.graph_calls, self.engine_calls]
        return [*calls, self.compiled, self.kernels, self.moved_bytes, self.waits]

    def to_json(self) -> list[Any]:
        """Plain values, for the cache."""
        counts = [[[*key, count] for key, count in found] for found in (self.attention, self.products)]
        return [*self._numbers, *counts, self.copied_bytes]

    @classmethod
    def from_json(cls, values: list[Any]) -> Work:
        """The work that `to_json` wrote."""
        attention, products = (
            tuple((tuple(key), count) for *key, count in found) for found in values[_NUMBERS : _NUMBERS + 2]
        )
        numbers = cls(*values[:_NUMBERS])
        counts: dict[str, Any] = {"attention": attention, "products": products}
        return replace(numbers, **counts, copied_bytes=values[_NUMBERS + 2])

    def plus(self, other: Work, times: int = 1) -> Work:
        """The sum, the other one taken `times`."""
        numbers: list[Any] = [one + times * more for one, more in zip(self._numbers, other._numbers, strict=True)]
        return replace(
            Work(*numbers),
            attention=_sum(self.attention, other.attention, times),
            products=_sum(self.products, other.products, times),
            copied_bytes=self.copied_bytes + times * other.copied_bytes,
        )

    def continued(self, before: Work, times: int) -> Work:
        """What calls, kernels and traffic come to `times` as far on as from `before` to here; products stay."""
        numbers: list[Any] = [
            now + times * (now - then) for now, then in zip(self._numbers, before._numbers, strict=True)
        ]
        return replace(Work(*numbers), attention=self.attention, products=self.products, copied_bytes=self.copied_bytes)

    @property
    def product_operations(self) -> int:
        """Multiplications and additions of the matrix products."""
        return sum(2 * rows * inner * columns * count for (rows, inner, columns, _), count in self.products)


_NUMBERS = 8  # of the attributes, those that come first


_Key = TypeVar("_Key", Product, Attention)


def _sum(
    counts: tuple[tuple[_Key, int], ...], more: tuple[tuple[_Key, int], ...], times: int
) -> tuple[tuple[_Key, int], ...]:
    found = Counter(dict(counts))
    for key, count in more:
        found[key] += times * count
    return tuple(sorted(found.items()))


class WorkCounter:
    """Adds up work while a step is recorded."""

    def __init__(self) -> None:
        self._views = self._calls = self._graph_calls = self._engine_calls = 0
        self._compiled = self._kernels = self._moved = self._waits = self._copied = 0
        self._attention: Counter[Attention] = Counter()
        self._products: Counter[Product] = Counter()

    @property
    def is_used(self) -> bool:
        """Whether anything was added."""
        return self.total() != Work()

    def called(self, times: int = 1, *, in_graph: bool = False, by_engine: bool = False, is_view: bool = False) -> None:
        """Operations were issued: by Python, where autograd follows or not, or by autograd's engine."""
        if by_engine:
            self._engine_calls += times
        elif is_view:
            self._views += times
        elif in_graph:
            self._graph_calls += times
        else:
            self._calls += times

    def launched(self, moved_bytes: int, *, compiled: bool = False) -> None:
        """A kernel that moves so many bytes."""
        self._kernels += 1
        self._compiled += compiled
        self._moved += moved_bytes

    def moved(self, moved_bytes: int) -> None:
        """A part of a kernel that works on many tensors."""
        self._moved += moved_bytes

    def waited(self) -> None:
        """The host goes on when the device has done all that was issued."""
        self._waits += 1

    def copied(self, nbytes: int) -> None:
        """The copy engine moves so many bytes to main memory or back, beside what the device computes."""
        self.launched(nbytes)
        self._copied += nbytes

    def attended(self, tokens: int, heads: int, channels: int, products: int, row_tokens: int) -> None:
        """An attention kernel."""
        self._kernels += 1
        self._attention[tokens, heads, channels, products, row_tokens] += 1

    def multiplied(self, batch: int, rows: int, inner: int, columns: int, element_bytes: int) -> None:
        """A matrix product, or a batch of them."""
        self._products[rows, inner, columns, element_bytes] += batch

    def total(self) -> Work:
        """What was added up."""
        return Work(
            self._views,
            self._calls,
            self._graph_calls,
            self._engine_calls,
            self._compiled,
            self._kernels,
            self._moved,
            self._waits,
            tuple(sorted(self._attention.items())),
            tuple(sorted(self._products.items())),
            self._copied,
        )
