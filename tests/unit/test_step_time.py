"""The duration of a step follows from its operations, on every device and path."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laras.planning.architecture import model_spec_from_config
from laras.planning.catalogue import find_gpu
from laras.planning.memory import MemoryCase
from laras.planning.throughput import estimate_step_s, recorded_step_s
from laras.planning.work import Work, WorkCounter

H100, T4 = (find_gpu(name).to_hardware() for name in ("h100", "t4"))
SPEC = model_spec_from_config(
    {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "intermediate_size": 8192, "vocab_size": 32000,
    },
    "m",
)  # fmt: skip
MEASURED = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "benchmarks/results/step_time_work.jsonl").open(encoding="utf-8")
]
BUSY = Work(calls=10, kernels=5, moved_bytes=10**9, attention=10**9, products=(((4096, 4096, 4096, 2), 50),))


def predicted_s(row):
    work = {kind: Work.from_json(part) for kind, part in row["work"].items()}
    keys = {key: row[key] for key in ("span_tokens", "target_share", "accumulation")}
    return recorded_step_s(work, H100, **keys)


def test_measured_steps_are_predicted_within_10_percent_on_average():
    assert len(MEASURED) >= 90
    assert mean(abs(predicted_s(row) / row["measured_s"] - 1) for row in MEASURED) < 0.10


def test_work_survives_the_cache():
    assert Work.from_json(json.loads(json.dumps(BUSY.to_json()))) == BUSY


def test_work_adds_up():
    counter = WorkCounter()
    assert not counter.is_used
    for _ in range(2):
        counter.called()
        counter.launched(100)
        counter.multiplied(3, 8, 16, 32, 2)
    once = counter.total()
    assert once.products == (((8, 16, 32, 2), 6),)
    assert once.plus(once) == once.plus(once, 0).plus(once)


def test_the_host_is_the_limit_of_small_steps_and_the_device_of_large_ones():
    idle = Work(calls=1000, kernels=100)
    assert recorded_step_s({"forward": idle}, H100, span_tokens=1) == recorded_step_s(
        {"forward": idle}, T4, span_tokens=1
    )
    slow = recorded_step_s({"forward": BUSY}, T4, span_tokens=1000)
    assert slow > 5 * recorded_step_s({"forward": BUSY}, H100, span_tokens=1000)


def test_what_happens_once_a_step_is_shared_by_its_micro_batches():
    step = {"forward": BUSY, "optimizer": replace(BUSY, products=())}
    seconds = [recorded_step_s(step, H100, span_tokens=1000, accumulation=count) for count in (1, 2, 100)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == pytest.approx(recorded_step_s({"forward": BUSY}, H100, span_tokens=1000), rel=0.02)


def test_evaluation_is_no_part_of_a_step():
    assert recorded_step_s({"evaluation": BUSY}, H100, span_tokens=1) == 0


CASES = st.fixed_dictionaries(
    {
        "micro_batch": st.integers(1, 32),
        "length_tokens": st.integers(64, 8192),
        "lora_r": st.integers(1, 128),
        "checkpointing": st.booleans(),
        "full": st.booleans(),
        "fused": st.booleans(),
        "weights": st.sampled_from(["bf16", "nf4"]),
        "loss_kind": st.sampled_from(["full", "chunked"]),
        "checkpoint_kind": st.sampled_from(["selective", "full"]),
    }
)


@given(CASES, st.sampled_from(["micro_batch", "length_tokens", "lora_r"]), st.integers(1, 64))
def test_a_step_never_gets_faster_when_batch_length_or_rank_grows(case, key, more):
    larger = {**case, key: case[key] + more}
    assert estimate_step_s(SPEC, MemoryCase(**larger), H100) >= estimate_step_s(SPEC, MemoryCase(**case), H100)


@given(CASES)
def test_a_slower_card_is_never_faster(case):
    assert estimate_step_s(SPEC, MemoryCase(**case), T4) >= estimate_step_s(SPEC, MemoryCase(**case), H100)
