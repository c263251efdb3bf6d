"""Exact scores from per-example sums: the loss over a whole split, and how sure it is.

Everything here is a function of the set of examples alone: neither the order in which they were scored nor the
batches they came in change a result. Pure numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from laras.errors import DataError
from laras.records import SplitScore

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

RESAMPLES = 1000
DEFAULT_SEED = 0


@dataclass(frozen=True)
class ExampleSums:
    """What a model did on each of E examples: vectors of shape (E,), 24 bytes an example.

    Attributes:
        nll: Sum of the negative log-likelihoods of the example's target tokens, in nats.
        targets: Number of its target tokens; 0 for an example that carries no loss.
        correct: How many of them were the model's most likely token.
    """

    nll: FloatArray
    targets: IntArray
    correct: IntArray

    def __post_init__(self) -> None:
        shapes = {self.nll.shape, self.targets.shape, self.correct.shape}
        if len(shapes) != 1 or self.nll.ndim != 1:
            raise ValueError(f"per-example sums must be vectors of one length, not {sorted(shapes)}")

    def __len__(self) -> int:
        return int(self.nll.size)

    @classmethod
    def zeros(cls, examples: int) -> ExampleSums:
        """Sums of `examples` examples of which no token has been scored yet."""
        return cls(np.zeros(examples), np.zeros(examples, dtype=np.int64), np.zeros(examples, dtype=np.int64))


def score_of(sums: ExampleSums, *, seed: int = DEFAULT_SEED) -> SplitScore:
    """Loss, perplexity and accuracy of a split, with bootstrap 95% intervals over its examples.

    Args:
        sums: The sums of every example of the split.
        seed: Of the resampling; equal seeds and sums give equal intervals.

    Raises:
        DataError: When the split has no target token, so that it has no loss.

    Source: percentile bootstrap, Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    target_tokens = _target_tokens(sums)
    order = np.lexsort((sums.correct, sums.targets, sums.nll))
    nll, targets = sums.nll[order], sums.targets[order]
    loss = float(nll.sum() / target_tokens)
    low, high = _bootstrap_ci95(nll, targets, seed)
    return SplitScore(
        loss=loss,
        loss_ci95=(low, high),
        perplexity=perplexity_of(loss),
        perplexity_ci95=(perplexity_of(low), perplexity_of(high)),
        token_accuracy=float(sums.correct.sum() / target_tokens),
        target_tokens=target_tokens,
        examples=len(sums),
    )


def loss_improvement_ci95(base: ExampleSums, tuned: ExampleSums, *, seed: int = DEFAULT_SEED) -> tuple[float, float]:
    """Paired bootstrap 95% interval of `loss(base) - loss(tuned)`, in nats per target token; above 0 is better.

    Both models are resampled on the same examples, which removes the spread that hard and easy examples share.

    Args:
        base: Sums of the base model.
        tuned: Sums of the tuned model on the same examples in the same order.
        seed: Of the resampling.

    Raises:
        DataError: When the split has no target token.
        ValueError: When the two do not have the same examples.
    """
    if not np.array_equal(base.targets, tuned.targets):
        raise ValueError("base and tuned sums are of different examples: their target tokens differ")
    _target_tokens(base)
    order = np.lexsort((tuned.nll, base.nll, base.targets))
    return _bootstrap_ci95((base.nll - tuned.nll)[order], base.targets[order], seed)


def perplexity_of(loss: float) -> float:
    """`exp(loss)`; infinite, rather than an error, for a loss beyond about 709 nats."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


def _target_tokens(sums: ExampleSums) -> int:
    total = int(sums.targets.sum())
    if total == 0:
        raise DataError(
            f"the split has no target tokens in its {len(sums)} examples, so it has no loss",
            hint="give it examples with an answer, or a larger max_length if the answers were cut off",
        )
    return total


def _bootstrap_ci95(values: FloatArray, weights: IntArray, seed: int) -> tuple[float, float]:
    """Percentile interval of `sum(values) / sum(weights)` over resampled examples.

    Examples without weight are left out: they move no ratio, and a resample of them alone would divide by zero.
    """
    weighted = weights > 0
    values, weights = values[weighted], weights[weighted]
    rng = np.random.default_rng(seed)
    ratios = np.empty(RESAMPLES)
    for resample in range(RESAMPLES):  # one at a time: memory stays a small multiple of E
        drawn = rng.integers(0, values.size, values.size)
        ratios[resample] = values[drawn].sum() / weights[drawn].sum()
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
