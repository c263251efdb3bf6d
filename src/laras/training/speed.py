"""How fast training runs, and when it will end. Evaluations and saving are no part of the speed, but of the end."""

from __future__ import annotations

_WEIGHT = 0.1  # of the newest step in the running means


class Speed:
    """Running means of the duration of steps and evaluations.

    Attributes:
        tokens_per_s: Useful tokens (without padding) of all processes per second of training steps.
        tokens: Of this session.
        step_s: Mean duration of a step in seconds.
    """

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        self.step_s = 0.0
        self.tokens = 0
        self.train_s = 0.0
        self._evaluation_s = 0.0
        self._mean_tokens = 0.0
        self._steps = 0

    def step_done(self, elapsed_s: float, tokens: int) -> None:
        """Takes one optimizer step into account; the first, which compiles and warms up, only until the second."""
        self._steps += 1
        weight = 1.0 if self._steps <= 2 else _WEIGHT
        self.step_s += weight * (elapsed_s - self.step_s)
        self._mean_tokens += weight * (tokens - self._mean_tokens)
        self.tokens_per_s = self._mean_tokens / self.step_s if self.step_s > 0 else 0.0
        self.tokens += tokens
        self.train_s += elapsed_s

    def evaluation_done(self, elapsed_s: float) -> None:
        """Takes one evaluation, with the saving that goes with it, into account."""
        self._evaluation_s = elapsed_s

    def eta_s(self, step: int, total_steps: int, eval_steps: int) -> float:
        """Seconds from step `step` to the end, if early stopping does not come first."""
        remaining = max(0, total_steps - step)
        return remaining * self.step_s + -(-remaining // max(1, eval_steps)) * self._evaluation_s
