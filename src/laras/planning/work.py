"""What a recorded step asks of a device besides memory: arithmetic, traffic, launches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

Product = tuple[int, int, int, int]  # rows, inner, columns, bytes of an element; a batch multiplies its count


@dataclass(frozen=True)
class Work:
    """Of a stretch of a step.

    Attributes:
        calls: Operations that the CPU issues, views included.
        kernels: Those that run something on the device, matrix products apart.
        moved_bytes: Read and written by them.
        attention: Operations of the attention kernels per token that each token attends to.
        products: Matrix products and how many there are of each.
    """

    calls: int = 0
    kernels: int = 0
    moved_bytes: int = 0
    attention: int = 0
    products: tuple[tuple[Product, int], ...] = ()

    def to_json(self) -> list[Any]:
        """Plain values, for the cache."""
        products = [[*product, count] for product, count in self.products]
        return [self.calls, self.kernels, self.moved_bytes, self.attention, products]

    @classmethod
    def from_json(cls, values: list[Any]) -> Work:
        """The work that `to_json` wrote."""
        calls, kernels, moved, attention, products = values
        return cls(
            calls, kernels, moved, attention, tuple(((a, b, c, size), count) for a, b, c, size, count in products)
        )

    def plus(self, other: Work, times: int = 1) -> Work:
        """The sum, the other one taken `times`."""
        products = Counter(dict(self.products))
        for product, count in other.products:
            products[product] += times * count
        return Work(
            self.calls + times * other.calls,
            self.kernels + times * other.kernels,
            self.moved_bytes + times * other.moved_bytes,
            self.attention + times * other.attention,
            tuple(sorted(products.items())),
        )


class WorkCounter:
    """Adds up work while a step is recorded."""

    def __init__(self) -> None:
        self._calls = self._kernels = self._moved = self._attention = 0
        self._products: Counter[Product] = Counter()

    @property
    def is_used(self) -> bool:
        """Whether anything was added."""
        return self._calls > 0 or self._kernels > 0

    def called(self, times: int = 1) -> None:
        """The CPU issued operations."""
        self._calls += times

    def launched(self, moved_bytes: int) -> None:
        """A kernel that moves so many bytes."""
        self._kernels += 1
        self._moved += moved_bytes

    def attended(self, operations_per_token: int) -> None:
        """An attention kernel."""
        self._attention += operations_per_token

    def multiplied(self, batch: int, rows: int, inner: int, columns: int, element_bytes: int) -> None:
        """A matrix product, or a batch of them."""
        self._products[rows, inner, columns, element_bytes] += batch

    def total(self) -> Work:
        """What was added up."""
        return Work(self._calls, self._kernels, self._moved, self._attention, tuple(sorted(self._products.items())))
