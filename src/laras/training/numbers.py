"""Numbers that training watches: losses that are not finite, sudden rises, and when to stop early.

Everything here is plain data that a checkpoint holds, so that a resume goes on with the same counters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_SPIKE_AFTER_STEPS = 20  # steps before a rise can be told from the noise
_SPIKE_DEVIATIONS = 6.0
_SPIKE_MIN_RISE = 0.5  # nats per token
_DECAY = 0.95  # of the running mean and variance: a memory of about 20 steps


@dataclass
class LossWatch:
    """Running mean and variance of the step losses; says when a loss stands out."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss lies far above the recent ones; it then counts as one of them."""
        rise = loss - self.mean
        limit = max(_SPIKE_MIN_RISE, _SPIKE_DEVIATIONS * math.sqrt(self.variance))
        spike = self.steps >= _SPIKE_AFTER_STEPS and rise > limit
        self.steps += 1
        if self.steps == 1:
            self.mean = loss
        else:
            self.mean += (1 - _DECAY) * rise
            self.variance = _DECAY * (self.variance + (1 - _DECAY) * rise * rise)
        return spike


@dataclass
class Stopping:
    """Early stopping on the validation loss.

    Attributes:
        patience: Evaluations without improvement after which training stops; None: never.
        min_delta: Fall of the loss, in nats per token, that counts as improvement.
        reference: The loss that the next one is compared with.
        without_improvement: Evaluations since.
    """

    patience: int | None
    min_delta: float
    reference: float | None = None
    without_improvement: int = 0

    def should_stop(self, loss: float) -> bool:
        """Takes one evaluation into account."""
        if math.isfinite(loss) and (self.reference is None or loss < self.reference - self.min_delta):
            self.reference, self.without_improvement = loss, 0
        else:
            self.without_improvement += 1
        return self.patience is not None and self.without_improvement >= self.patience
