"""Number formats as torch types; which one a run uses is decided in `laras.planning.precision`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from laras.planning.precision import BF16_CAPABILITY, FP16_CAPABILITY, choose_precision
from laras.records import Precision

if TYPE_CHECKING:
    import torch

__all__ = ["BF16_CAPABILITY", "FP16_CAPABILITY", "choose_precision", "torch_dtype"]


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch type of a format."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
