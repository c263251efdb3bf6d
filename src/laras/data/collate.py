"""Rows of different lengths to one rectangular batch. Shapes: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laras.data.masks import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

PAD_TO_MULTIPLE_OF = 8  # tokens; tensor cores want it


@dataclass(frozen=True)
class PadCollator:
    """Pads tokenised rows on the right, where a causal model's other tokens cannot see the padding.

    Attributes:
        pad_token_id: Fills `input_ids`; None, for a tokenizer without one, stands for 0. Any id does, as padding is
            masked and carries no label.
    """

    pad_token_id: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates `input_ids` and `labels` of the rows; their other columns are left out.

        Returns:
            `input_ids`, `labels` (-100 in the padding) and `attention_mask` (1 on tokens), int64 of shape (B, T) on
            CPU, with T the longest length rounded up to a multiple of 8.

        Raises:
            ValueError: When there is no row, or a row has not one label a token.
        """
        import torch

        if not rows:
            raise ValueError("a batch needs at least one row")
        lengths = [len(row["input_ids"]) for row in rows]
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if len(row["labels"]) != length:
                raise ValueError(f"row {index} of the batch has {length} tokens and {len(row['labels'])} labels")
        shape = (len(rows), padded_length(max(lengths)))
        input_ids = torch.full(shape, self.pad_token_id or 0, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[index, :length] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            labels[index, :length] = torch.as_tensor(row["labels"], dtype=torch.int64)
            attention_mask[index, :length] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def padded_length(length: int) -> int:
    """The length in tokens, rounded up to a multiple of 8."""
    return -(-length // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
