"""The step that everything shares: a batch through the model to the losses of its target tokens.

Training differentiates it, evaluation sums it, and planning runs it on meta tensors to learn what it needs, so that
what is planned, trained and scored is one computation. A batch is padded (`attention_mask`) or packed (`cu_seqlens`,
see `laras.data.pack`). Shapes: B rows, T tokens, N target tokens, K kept columns, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laras.data.masks import IGNORE_INDEX
from laras.models.fused.loss import chunked_nll
from laras.models.fused.model import FusedModel
from laras.models.heads import plain_head

EVALUATION_CHUNK = 1024  # target tokens whose logits exist at once


class TrainStep(Protocol):
    """Forward and backward of a model on its device."""

    @property
    def rehearsals(self) -> int:
        """Calls after which it holds all the memory that it will ever hold."""

    def __call__(self, batch: Mapping[str, Tensor], scale: Tensor) -> Tensor:
        """Adds the gradients of loss x scale to `.grad`.

        Args:
            batch: On the model's device.
            scale: A scalar there.

        Returns:
            The summed loss, a detached scalar.
        """

    def release(self) -> None:
        """Gives back what it keeps between calls; the next ones may take longer."""


@dataclass(frozen=True)
class TargetLosses:
    """Per-target-token results, in row-major order of the batch."""

    nll_N: Tensor  # float32, nats
    correct_N: Tensor  # bool: the label is the most likely token
    row_N: Tensor  # int64: the row of the batch that each target belongs to


@dataclass(frozen=True)
class ExecutionPath:
    """How a model computes its steps; `laras.models.build` leaves it on the model as `laras_path`."""

    fused: FusedModel | None = None
    fused_refusal: str | None = None  # why there are no fused layers
    loss_kind: str = "full"
    loss_chunk_tokens: int = 1024
    max_document_tokens: int | None = None
    autocast: torch.dtype | None = None  # of layers that are not fused, in half precision with adapters in fp32
    # Of layers that another library has built: the model without its adapter wrapper and inputs to (B, T, D).
    hidden_states: Callable[[Any, Mapping[str, Tensor]], Tensor] | None = None

    @property
    def checkpoints_itself(self) -> bool:
        """Whether checkpointing is no business of transformers' layers."""
        return self.fused is not None or self.hidden_states is not None

    def computing(self, device: torch.device) -> AbstractContextManager[object]:
        """What the model's own layers run under; planning emulates it on the meta device."""
        if self.autocast is None or device.type == "meta":
            return nullcontext()
        return torch.autocast(device.type, self.autocast)


def path_of(model: nn.Module) -> ExecutionPath:
    """The path that was built for the model, or the plain one."""
    path = getattr(model, "laras_path", None)
    return path if isinstance(path, ExecutionPath) else ExecutionPath()


def shifted_labels(labels_BT: Tensor) -> Tensor:
    """Moves labels one to the left, so that position t holds the token that t must predict; the last is ignored."""
    return nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)


def target_positions(labels_BT: Tensor) -> Tensor:
    """Where, in the flattened batch, the hidden states are that predict a target: int64 of shape (N,).

    On a GPU it waits for the device. Batches of `laras.data.pack` bring it with them, as `target_positions`.
    """
    return (shifted_labels(labels_BT).flatten() != IGNORE_INDEX).nonzero().squeeze(1)


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that the model's forward takes; labels stay outside."""
    return {key: value for key, value in batch.items() if key not in ("labels", "target_positions")}


def target_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> TargetLosses:
    """Losses of the batch's target tokens, with logits computed only where some row has a target.

    Args:
        model: A causal language model of transformers, PEFT-wrapped or not.
        batch: `input_ids` and `labels` (B, T), `attention_mask` where padded, what packing adds where packed.
    """
    targets_BT = shifted_labels(batch["labels"])
    is_target_BT = targets_BT != IGNORE_INDEX
    head = plain_head(model)
    if head is not None and not torch.is_grad_enabled():
        return _chunked_target_losses(model, head, batch, targets_BT, is_target_BT)
    columns = is_target_BT.any(dim=0).nonzero().squeeze(1)
    with path_of(model).computing(targets_BT.device):
        output = model(**_inputs(model, batch), logits_to_keep=columns, use_cache=False)
    kept_BK = is_target_BT[:, columns]
    logits_NV = output.logits[kept_BK].float()
    targets_N = targets_BT[:, columns][kept_BK]
    nll_N = nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    row_N = kept_BK.nonzero()[:, 0]
    return TargetLosses(nll_N, logits_NV.detach().argmax(dim=-1) == targets_N, row_N)


def summed_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of the negative log-likelihoods of the batch's target tokens: a float32 scalar, differentiable."""
    path = path_of(model)
    if path.fused is not None and path.fused.refusal() is None:
        return path.fused.summed_loss(batch)
    head = plain_head(model) if path.loss_kind == "chunked" else None
    if head is None or head.weight.requires_grad:
        return target_losses(model, batch).nll_N.sum()
    hidden_BTD = _hidden_states(model, batch)
    targets_BT = shifted_labels(batch["labels"])
    positions = batch.get("target_positions")
    if positions is None:
        positions = target_positions(batch["labels"])
    hidden_ND = hidden_BTD.flatten(0, 1)[positions]
    return chunked_nll(hidden_ND, head.weight, head.bias, targets_BT.flatten()[positions], path.loss_chunk_tokens)


def eager_step(model: nn.Module) -> TrainStep:
    """Forward and backward through autograd, whatever path the model has."""
    return _EagerStep(model)


@dataclass(frozen=True)
class _EagerStep:
    """A `TrainStep` of which every call is like the first."""

    model: nn.Module
    rehearsals: int = 1

    def __call__(self, batch: Mapping[str, Tensor], scale: Tensor) -> Tensor:
        """See `TrainStep`."""
        loss = summed_loss(self.model, batch)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def release(self) -> None:
        """Nothing is kept."""


def _inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    inputs: dict[str, Any] = model_inputs(batch)
    longest = path_of(model).max_document_tokens
    if "cu_seqlens" in inputs and longest is not None:
        inputs["max_document_tokens"] = longest
    return inputs


def _hidden_states(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Output of the decoder, before the head (B, T, D)."""
    whole: Any = model
    causal = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    path = path_of(model)
    with path.computing(batch["labels"].device):
        if path.hidden_states is not None:
            return path.hidden_states(causal, model_inputs(batch))
        output = causal.base_model(**_inputs(model, batch), use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def _chunked_target_losses(
    model: nn.Module, head: nn.Linear, batch: Mapping[str, Tensor], targets_BT: Tensor, is_target_BT: Tensor
) -> TargetLosses:
    hidden_ND = _hidden_states(model, batch)[is_target_BT]
    targets_N = targets_BT[is_target_BT]
    nll, correct = [], []
    for hidden_KD, targets_K in zip(
        torch.split(hidden_ND, EVALUATION_CHUNK), torch.split(targets_N, EVALUATION_CHUNK), strict=True
    ):
        logits_KV = head(hidden_KD).float()
        nll.append(nn.functional.cross_entropy(logits_KV, targets_K, reduction="none"))
        correct.append(logits_KV.argmax(dim=-1) == targets_K)
    return TargetLosses(torch.cat(nll), torch.cat(correct), is_target_BT.nonzero()[:, 0])
