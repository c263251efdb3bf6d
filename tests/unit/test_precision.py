"""Precision follows what the device computes natively, and says why."""

from __future__ import annotations

import pytest
import torch

from laras.errors import ConfigError
from laras.models.precision import choose_precision, torch_dtype


@pytest.mark.parametrize(
    ("kind", "capability", "expected"),
    [
        ("cuda", (9, 0), "bf16"),
        ("cuda", (8, 0), "bf16"),
        ("cuda", (7, 5), "fp16"),
        ("cuda", (7, 0), "fp16"),
        ("cuda", (6, 1), "fp32"),
        ("cpu", None, "fp32"),
    ],
)
def test_the_ladder_follows_the_capability(kind, capability, expected):
    precision, reason = choose_precision("auto", kind, capability)
    assert precision == expected
    assert ("CPU" if kind == "cpu" else f"{capability[0]}.{capability[1]}") in reason


@pytest.mark.parametrize(("requested", "kind", "capability"), [("fp32", "cuda", (9, 0)), ("bf16", "cpu", None)])
def test_a_requested_precision_is_respected(requested, kind, capability):
    assert choose_precision(requested, kind, capability) == (requested, "set in the configuration")


@pytest.mark.parametrize(("requested", "kind", "capability"), [("bf16", "cuda", (7, 5)), ("fp16", "cpu", None)])
def test_a_precision_that_does_not_train_here_is_refused(requested, kind, capability):
    with pytest.raises(ConfigError, match=requested) as caught:
        choose_precision(requested, kind, capability)
    assert "precision: auto" in str(caught.value)


def test_each_precision_has_its_torch_type():
    assert [torch_dtype(p) for p in ("bf16", "fp16", "fp32")] == [torch.bfloat16, torch.float16, torch.float32]
