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
from laras.planning.throughput import RATES, estimate_step_s, recorded_step_s
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
BUSY = Work(
    calls=10, kernels=5, moved_bytes=10**9, attention=(((4096, 32, 128, 2), 64),),
    products=(((4096, 4096, 4096, 2), 50),),
)  # fmt: skip


def predicted_s(row, rates=None):
    work = {kind: Work.from_json(part) for kind, part in row["work"].items()}
    keys = {key: row[key] for key in ("span_tokens", "target_share", "token_share", "accumulation", "is_waited_for")}
    if rates is None:  # what was measured before kernels were launched directly had Triton's own dispatch
        rates = replace(RATES, compiled_s=190e-6) if row.get("is_dispatched", True) else RATES
    return recorded_step_s(work, find_gpu(row.get("gpu", "h100")).to_hardware(), rates, **keys)


def test_measured_steps_are_predicted_within_10_percent_on_average():
    assert len(MEASURED) >= 180
    assert mean(abs(predicted_s(row) / row["measured_s"] - 1) for row in MEASURED) < 0.10


def test_work_survives_the_cache():
    assert Work.from_json(json.loads(json.dumps(BUSY.to_json()))) == BUSY


def test_work_adds_up():
    counter = WorkCounter()
    assert not counter.is_used
    for _ in range(2):
        counter.called()
        counter.called(in_graph=True)
        counter.called(3, by_engine=True)
        counter.launched(100, compiled=True)
        counter.moved(11)
        counter.attended(8, 4, 2, 5)
        counter.multiplied(3, 8, 16, 32, 2)
    once = counter.total()
    assert once == Work(2, 2, 6, 2, 4, 222, (((8, 4, 2, 5), 2),), (((8, 16, 32, 2), 6),))
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


def test_the_host_may_be_behind_in_forward_and_the_device_in_backward():
    slow_host, slow_device = Work(calls=100_000), replace(BUSY, calls=0, kernels=0)
    alone = [recorded_step_s({kind: part}, H100, span_tokens=1000) for kind, part in
             (("forward", slow_host), ("backward", slow_device))]  # fmt: skip
    one_after_the_other = {"forward": slow_host, "backward": slow_device}
    assert recorded_step_s(one_after_the_other, H100, span_tokens=1000) == pytest.approx(sum(alone), rel=0.01)
    beside = {"forward": slow_device, "backward": slow_host}
    assert recorded_step_s(beside, H100, span_tokens=1000) == pytest.approx(max(alone), rel=0.01)
    unwatched = recorded_step_s(one_after_the_other, H100, span_tokens=1000, is_waited_for=False)
    assert unwatched == pytest.approx(max(alone), rel=0.01)


def test_many_micro_batches_take_as_long_as_one_after_the_other():
    step = {"batch": BUSY, "forward": replace(BUSY, calls=3000), "backward": BUSY, "optimizer": Work(calls=100)}
    seconds = [count * recorded_step_s(step, H100, span_tokens=1000, accumulation=count) for count in (40, 41, 42)]
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0])


def test_evaluation_is_no_part_of_a_step():
    assert recorded_step_s({"evaluation": BUSY}, H100, span_tokens=1) == 0


GRID = [row for row in MEASURED if row["key"].startswith("grid|")]
SHAPES = {
    "qwen2.5-1.5b": (
        {"model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
         "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True}, 16,
    ),
    "llama-3.1-8b": (
        {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}, 32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", GRID[::5], ids=lambda row: row["key"])
def test_the_closed_form_of_fused_layers_agrees_with_the_simulated_step(row):
    _, model, method, _, split, kind = row["key"].split("|")
    values, rank = SHAPES[model]
    case = MemoryCase(
        micro_batch=int(split.partition("x")[0]), length_tokens=1024, fused=True, checkpointing=kind != "none",
        checkpoint_kind=kind, weights="nf4" if method == "qlora" else "bf16", adapters="fp32-autocast",
        loss_kind="chunked", loss_chunk_tokens=1024, lora_r=rank, optim="adamw_torch_fused",
    )  # fmt: skip
    closed_s = estimate_step_s(
        model_spec_from_config(values, model), case, H100, attended_tokens=row["span_tokens"],
        accumulation=row["accumulation"],
    )  # fmt: skip
    assert closed_s == pytest.approx(predicted_s(row, RATES), rel=0.02)


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
        "checkpoint_kind": st.sampled_from(["selective", "full", "offload"]),
    }
)


@given(CASES, st.sampled_from(["micro_batch", "length_tokens", "lora_r"]), st.integers(1, 64))
def test_a_step_never_gets_faster_when_batch_length_or_rank_grows(case, key, more):
    larger = {**case, key: case[key] + more}
    assert estimate_step_s(SPEC, MemoryCase(**larger), H100) >= estimate_step_s(SPEC, MemoryCase(**case), H100)


@given(CASES)
def test_a_slower_card_is_never_faster(case):
    assert estimate_step_s(SPEC, MemoryCase(**case), T4) >= estimate_step_s(SPEC, MemoryCase(**case), H100)
