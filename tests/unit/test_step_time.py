"""The duration of a step follows from its operations, on every device and path."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laras.config import RunConfig
from laras.planning.architecture import model_spec_from_config
from laras.planning.candidates import candidates
from laras.planning.catalogue import find_gpu
from laras.planning.memory import MemoryCase
from laras.planning.step_forms import INT8_CALLS, NF4_CALLS, UNPACKING_CALLS, closed_work
from laras.planning.throughput import RATES, estimate_step_s, on_busy_host, recorded_step_s
from laras.planning.work import Work, WorkCounter
from laras.planning.workload import workload

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
    calls=10, kernels=5, moved_bytes=10**9, attention=(((4096, 32, 128, 2, 0), 64),),
    products=(((4096, 4096, 4096, 2), 50),),
)  # fmt: skip


def predicted_s(row, rates=None):
    work = {kind: Work.from_json(part) for kind, part in row["work"].items()}
    keys = {key: row[key] for key in ("span_tokens", "target_share", "accumulation", "is_waited_for")}
    if rates is None:  # what was measured before kernels were launched directly had Triton's own dispatch
        rates = replace(RATES, compiled_s=190e-6) if row["is_dispatched"] else RATES
    return recorded_step_s(work, find_gpu(row["gpu"]).to_hardware(), rates, replayed=row.get("replayed", False), **keys)


def errors_of(*kinds, gpu):
    rows = [row for row in MEASURED if row["gpu"] == gpu and row["key"].partition("|")[0] in kinds]
    return [abs(predicted_s(row) / row["measured_s"] - 1) for row in rows]


def test_steps_on_free_cores_or_that_the_device_limits_are_predicted_within_15_percent():
    errors = errors_of("memory", "blind", gpu="H200")
    assert len(errors) >= 150
    assert mean(error <= 0.15 for error in errors) >= 0.97
    assert mean(errors) < 0.05


def test_steps_on_any_core_are_predicted_within_10_percent_on_average():
    assert mean(errors_of("grid", gpu="H100") + errors_of("grid", gpu="H200")) < 0.10


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
        counter.called(4, is_view=True)
        counter.attended(8, 4, 2, 5, 0)
        counter.multiplied(3, 8, 16, 32, 2)
        counter.waited()
    once = counter.total()
    assert once == Work(8, 2, 2, 6, 2, 4, 222, 2, (((8, 4, 2, 5, 0), 2),), (((8, 16, 32, 2), 6),))
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


def test_where_the_host_waits_what_it_issues_and_what_the_device_does_take_their_time_one_after_the_other():
    part = replace(BUSY, calls=5_000)
    waiting = {"backward": BUSY, "optimizer": replace(part, waits=3)}
    alone = [recorded_step_s({"optimizer": one}, H100, span_tokens=1000) for one in (BUSY, Work(calls=5_000))]
    whole = recorded_step_s({"backward": BUSY}, H100, span_tokens=1000) + sum(alone)
    assert recorded_step_s(waiting, H100, span_tokens=1000) == pytest.approx(whole, rel=0.01)
    beside = recorded_step_s({**waiting, "optimizer": part}, H100, span_tokens=1000)
    assert beside < 0.9 * whole


def test_a_view_costs_the_host_less_than_a_launch_and_one_that_autograd_follows_more():
    def seconds(**work):
        return recorded_step_s({"forward": Work(**work)}, H100, span_tokens=1)

    assert seconds(views=100) < seconds(calls=100) < seconds(graph_calls=100)


def test_attention_under_a_mask_goes_through_whole_rows_and_other_attention_through_documents():
    def seconds(row_tokens, span_tokens):
        attention = (((16384, 32, 128, 2, row_tokens), 64),)
        return recorded_step_s({"forward": Work(attention=attention)}, H100, span_tokens=span_tokens)

    assert seconds(16384, 100) == seconds(16384, 200) > seconds(8192, 100)
    assert seconds(0, 100) < seconds(0, 200)


def test_plans_are_compared_on_a_host_that_is_slower_and_times_are_told_for_a_free_one():
    config, spec = RunConfig(max_length=1024), SPEC
    for one in candidates(config, spec, H100, "bf16", workload(config, None, None, spec)):
        assert one.busy_tokens_per_s <= one.tokens_per_s
        assert one.worth <= one.busy_tokens_per_s
    host = {"forward": Work(calls=100_000)}
    for measured, compared in ((1.0, 1.5), (1.25, 1.5), (2.0, 2.0)):  # a host that was found slow is no slower for it
        here = H100.model_copy(update={"host_times_as_slow": measured})
        assert recorded_step_s(host, on_busy_host(here), span_tokens=1) == pytest.approx(
            compared * recorded_step_s(host, H100, span_tokens=1)
        )
    device = {"forward": replace(BUSY, calls=0)}
    assert recorded_step_s(device, on_busy_host(H100), span_tokens=1) == recorded_step_s(device, H100, span_tokens=1)


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
    assert closed_s == pytest.approx(predicted_s({**row, "gpu": "H100"}, RATES), rel=0.02)


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


def test_int8_costs_the_host_more_in_forward_alone_and_4_bit_in_backward_too():
    def calls(weights):
        case = MemoryCase(
            micro_batch=2, length_tokens=1024, eval_batch=1, checkpointing=False, full=False, weights=weights,
            precision="bf16", adapters="fp32-autocast", optim="adamw_torch", loss_kind="chunked", lora_r=16,
            loss_chunk_tokens=1024,
        )  # fmt: skip
        work = closed_work(SPEC, case)
        return work["forward"].graph_calls, work["backward"].graph_calls

    (forward, backward), int8, nf4 = map(calls, ("bf16", "int8", "nf4"))
    linear = 7 * SPEC.layers
    assert int8 == (forward + INT8_CALLS * linear, backward)
    assert nf4 == (forward + NF4_CALLS * linear, backward + UNPACKING_CALLS * linear)


@pytest.fixture
def memory_cases(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import memory

    return memory, {case.key: case for case in (*memory.cases(), *memory.blind_cases())}


def test_the_closed_form_of_transformers_layers_is_near_the_simulated_step(memory_cases):
    memory, cases = memory_cases
    errors = []
    for row in MEASURED:
        kind, _, key = row["key"].partition("|")
        if row["gpu"] != "H200" or kind not in ("memory", "blind") or memory.choices_of(cases[key]).fused_layers:
            continue
        choices = memory.choices_of(cases[key])
        weights = "nf4" if choices.load_in_4bit else "int8" if choices.load_in_8bit else choices.precision
        case = MemoryCase(
            micro_batch=choices.per_device_train_batch_size, length_tokens=choices.max_length,
            bin_tokens=choices.packed_tokens, checkpointing=choices.gradient_checkpointing,
            full=choices.finetuning_type == "full", weights=weights, precision=choices.precision, optim=choices.optim,
            loss_kind=choices.loss_kind, loss_chunk_tokens=1024, lora_r=choices.lora_r,
            target_modules=choices.target_modules, dora=choices.use_dora, dropout=choices.lora_dropout > 0,
            adapters="compute" if choices.precision == "fp32" else "fp32-autocast",
        )  # fmt: skip
        spec = model_spec_from_config(memory._shape(cases[key]), "m")
        closed_s = estimate_step_s(
            spec, case, find_gpu("h200").to_hardware(), attended_tokens=row["span_tokens"],
            accumulation=row["accumulation"],
        )  # fmt: skip
        errors.append(abs(closed_s / predicted_s(row) - 1))
    assert len(errors) > 90
    assert mean(errors) < 0.11
    assert max(errors) < 0.4
