"""The step that everything shares: a batch through the model to the losses of its target tokens.

Training differentiates it, evaluation sums it, and planning runs it on meta tensors to learn what it needs, so that
what is planned, trained and scored is one computation. Shapes: B rows, T tokens, N target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

IGNORE_INDEX = -100


@dataclass(frozen=True)
class TargetLosses:
    """Per-target-token results, in row-major order of the batch."""

    nll_N: Tensor  # float32, nats
    correct_N: Tensor  # bool: the label is the most likely token
    row_N: Tensor  # int64: the row of the batch that each target belongs to


def shifted_labels(labels_BT: Tensor) -> Tensor:
    """Moves labels one to the left, so that position t holds the token that t must predict; the last is ignored."""
    return nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that the model's forward takes; labels stay outside."""
    return {key: value for key, value in batch.items() if key != "labels"}


def target_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> TargetLosses:
    """Losses of the batch's target tokens, with logits computed only where some row has a target.

    Args:
        model: A causal language model of transformers, PEFT-wrapped or not.
        batch: `input_ids` and `labels` (B, T), `attention_mask` where padded, what packing adds where packed.
    """
    targets_BT = shifted_labels(batch["labels"])
    is_target_BT = targets_BT != IGNORE_INDEX
    columns = is_target_BT.any(dim=0).nonzero().squeeze(1)
    output = model(**model_inputs(batch), logits_to_keep=columns, use_cache=False)
    kept_BK = is_target_BT[:, columns]
    logits_NV = output.logits[kept_BK].float()
    targets_N = targets_BT[:, columns][kept_BK]
    nll_N = nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    row_N = kept_BK.nonzero()[:, 0]
    return TargetLosses(nll_N, logits_NV.detach().argmax(dim=-1) == targets_N, row_N)


def summed_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of the negative log-likelihoods of the batch's target tokens: a float32 scalar, differentiable."""
    return target_losses(model, batch).nll_N.sum()
