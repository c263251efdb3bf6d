"""What a stage tells whoever watches: a terminal, a notebook, or nobody.

The stages call an `Observer`; the command line and the notebook subclass it. An observer only shows: it never
changes what happens, and nothing of the result depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from laras.formatting import duration, size

if TYPE_CHECKING:
    from laras.records import TrainPlan


@dataclass(frozen=True)
class StepReport:
    """The state after one optimizer step. Fields that a step did not measure are None."""

    step: int
    total_steps: int
    epoch: float
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_s: float
    eta_s: float
    memory_bytes: int  # allocated on the device, or resident on CPU
    memory_planned_bytes: int

    def __str__(self) -> str:
        """What matters most comes first: a narrow screen cuts the rest."""
        loss = f"loss {self.loss:.4f}" if self.loss is not None else "loss -"
        return (
            f"{loss}  {duration(self.eta_s)} left  {self.tokens_per_s:,.0f} tokens/s  "
            f"memory {size(self.memory_bytes)}, planned {size(self.memory_planned_bytes)}"
        )


@dataclass(frozen=True)
class ValidationReport:
    """One evaluation on the validation split."""

    step: int
    loss: float
    perplexity: float
    token_accuracy: float
    is_best: bool
    evaluations_without_improvement: int
    patience: int | None  # None: early stopping is off

    def __str__(self) -> str:
        """One line of at most 80 characters."""
        verdict = "new best" if self.is_best else "no improvement"
        if not self.is_best and self.patience is not None:
            verdict += f" ({self.evaluations_without_improvement}/{self.patience})"
        return (
            f"step {self.step:>5}  val. loss {self.loss:.4f}  ppl {self.perplexity:7.2f}  "
            f"accuracy {self.token_accuracy:5.1%}  {verdict}"
        )


def training_words(plan: TrainPlan, first_step: int) -> tuple[str, str]:
    """What begins, in two lines."""
    choices = plan.choices
    micro, accumulation = choices.per_device_train_batch_size, choices.gradient_accumulation_steps
    batch = f"{micro} x {accumulation} rows"
    if choices.packed_tokens is not None:
        batch = f"{choices.packed_tokens:,} x {accumulation} tokens"
    start = f" from step {first_step}" if first_step else ""
    return (
        f"training{start} on {plan.hardware.gpu_name} in {choices.precision}: {plan.total_steps} steps of "
        f"{batch}, about {duration(plan.time.total_s)}",
        f"  {choices.trainable_parameters:,} of {choices.total_parameters:,} parameters learn",
    )


class Observer:
    """Ignores everything; override what you show."""

    def stage_started(self, name: str) -> None:
        """A stage such as `reading data.jsonl` or `loading the model` begins."""

    def stage_progress(self, done: int, total: int | None, unit: str) -> None:
        """The current stage has done `done` of `total` (None: unknown) rows, tokens, bytes …"""

    def message(self, text: str) -> None:
        """Something that a person should know, in one line: a choice and its reason, a fallback."""

    def warning(self, text: str) -> None:
        """Something that a person should act on or be aware of."""

    def training_started(self, plan: TrainPlan, first_step: int) -> None:
        """Training begins, or goes on after a resume, at `first_step`."""

    def step_finished(self, report: StepReport) -> None:
        """An optimizer step is done."""

    def validated(self, report: ValidationReport) -> None:
        """The validation split has been evaluated."""

    def training_finished(self, status: str) -> None:
        """Training ended: finished, stopped early, interrupted or failed."""
