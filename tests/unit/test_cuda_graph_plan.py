"""A step is replayed as a CUDA graph where the host is the limit, and nowhere else; the plan says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from laras.config import RunConfig
from laras.planning.architecture import model_spec_from_config
from laras.planning.candidates import Candidate, candidates
from laras.planning.catalogue import find_gpu
from laras.planning.cuda_graph import replay_reason, with_replay
from laras.planning.memory import workspace_bytes
from laras.planning.planner import plan_training
from laras.planning.selection import select
from laras.planning.simulated import Simulate
from laras.planning.throughput import recorded_step_s
from laras.planning.trace import Segment, StepTrace
from laras.planning.work import Work
from laras.planning.workload import workload
from laras.records import TrainPlan

H100 = find_gpu("h100").to_hardware()
LLAMA = {
    "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32_000,
    "max_position_embeddings": 8192,
}  # fmt: skip
SPEC = model_spec_from_config(LLAMA, "m")
HOST_LIMITED = {"forward": Work(calls=10_000, moved_bytes=10**6)}
GPU_LIMITED = {"forward": Work(calls=100, moved_bytes=10**12)}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path))


def recorded(work: dict[str, Work]) -> Simulate:
    """A simulation whose every step takes this work."""

    def simulate(config: Any, choices: Any, layers: int, *_: Any) -> StepTrace:
        segments = (
            Segment("weights", 0, -1, (10**9,)),
            Segment("forward", 0, 0, (10**6, -2), work["forward"]),
        )
        return StepTrace(layers, segments)

    return simulate


def plan(work: dict[str, Work], hardware: Any = H100, **keys: Any) -> TrainPlan:
    config = RunConfig(max_length=1024, **keys)
    return plan_training(config, None, None, SPEC, hardware, recorded(work))


def test_a_step_that_the_host_limits_is_replayed_and_the_plan_tells_the_time_that_it_saves() -> None:
    issued, replayed = plan(HOST_LIMITED, cuda_graph=False), plan(HOST_LIMITED)
    assert (issued.choices.cuda_graph, replayed.choices.cuda_graph) == (False, True)
    assert replayed.time.tokens_per_s > 2 * issued.time.tokens_per_s
    assert replayed.reasons["cuda_graph"].startswith("on: the host issues a step more slowly than the GPU runs it")
    assert issued.reasons["cuda_graph"] == "as configured"


def test_an_alternative_that_cannot_be_replayed_has_the_speed_of_a_step_that_the_host_issues() -> None:
    def speeds(wanted: bool) -> dict[tuple[str, int | None], float]:
        config = RunConfig(max_length=1024, cuda_graph=wanted, gradient_checkpointing=True)
        work = workload(config, None, None, SPEC)
        found = candidates(config.model_copy(update={"cuda_graph": "auto"}), SPEC, H100, "bf16", work)
        chosen = select(config, SPEC, H100, work, found, recorded(HOST_LIMITED))
        assert chosen.best.replayed == wanted
        return {(one.case.checkpoint_kind, one.case.bin_tokens): one.tokens_per_s for one in chosen.others}

    issued, replayed = speeds(False), speeds(True)
    assert issued.keys() == replayed.keys() and {kind for kind, _ in issued} == {"selective", "full", "offload"}
    for (kind, tokens), speed in issued.items():
        if kind == "offload":
            assert replayed[kind, tokens] == pytest.approx(speed)
        else:
            assert replayed[kind, tokens] > 2 * speed


def test_a_step_that_the_gpu_limits_is_not() -> None:
    assert not plan(GPU_LIMITED).choices.cuda_graph
    assert plan(GPU_LIMITED).reasons["cuda_graph"].startswith("off: the GPU is the limit")
    assert plan(GPU_LIMITED, cuda_graph=True).choices.cuda_graph


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"packing": False}, "without packing every batch has another shape"),
        ({"lora_dropout": 0.1}, "the layers are not Laras' own"),
        ({"full_determinism": True}, "with full_determinism"),
    ],
)
@pytest.mark.parametrize("wanted", ["auto", True])
def test_what_cannot_be_replayed_is_not_and_the_reason_is_given(
    keys: dict[str, Any], reason: str, wanted: bool | str
) -> None:
    found = plan(HOST_LIMITED, cuda_graph=wanted, **keys)
    assert not found.choices.cuda_graph
    assert found.reasons["cuda_graph"].startswith(f"off: {reason}")
    assert [reason in warning for warning in found.warnings] == ([True] if wanted is True else [])


def test_several_gpus_share_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not plan(HOST_LIMITED, H100.model_copy(update={"count": 2})).choices.cuda_graph
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not plan(HOST_LIMITED).choices.cuda_graph


GIB = 2**30


def simulated(train_gib: int, evaluation_gib: int, budget_gib: int) -> Candidate:
    """A candidate whose weights take 2 GiB, beside which a step takes so much."""
    config, spec = RunConfig(max_length=1024), SPEC
    one = candidates(config, spec, H100, "bf16", workload(config, None, None, spec))[0]
    train, evaluation = (2 + train_gib) * GIB, (2 + evaluation_gib) * GIB
    memory = one.memory.model_copy(
        update={
            "train_peak_allocated_bytes": train, "train_peak_reserved_bytes": max(train, evaluation),
            "eval_peak_allocated_bytes": evaluation, "device_budget_bytes": budget_gib * GIB,
            "components": {"weights": 2 * GIB, "activations": train - 2 * GIB}, "process_bytes": 20 * GIB,
        }
    )  # fmt: skip
    return replace(one, memory=memory, fits=max(train, evaluation) <= budget_gib * GIB)


@pytest.mark.parametrize(("train_gib", "evaluation_gib"), [(4, 1), (1, 4)])
def test_a_graph_has_gradients_and_workspaces_of_its_own_and_leaves_evaluation_nothing_of_its_memory(
    train_gib: int, evaluation_gib: int
) -> None:
    issued = simulated(train_gib, evaluation_gib, budget_gib=40)
    found = with_replay(RunConfig(), H100, issued, issued.at_speed(2.0), trained=10**6)
    before, after = issued.memory, found.memory
    workspace = workspace_bytes(H100) // 2
    graph = 4 * 10**6 + workspace
    assert after.components["CUDA graph"] == graph
    assert after.train_peak_allocated_bytes - before.train_peak_allocated_bytes == graph
    assert sum(after.components.values()) == after.train_peak_allocated_bytes
    both = (2 + train_gib + evaluation_gib) * GIB  # what is kept, the graph's, and what an evaluation takes
    assert after.train_peak_reserved_bytes == both + graph + workspace
    assert after.process_bytes - before.process_bytes == after.train_peak_reserved_bytes - 6 * GIB


def test_a_graph_that_does_not_fit_is_left_out_or_when_it_is_wanted_refused() -> None:
    spacious, tight = simulated(4, 4, budget_gib=11), simulated(4, 4, budget_gib=10)
    assert with_replay(RunConfig(), H100, spacious, spacious.at_speed(2.0), 10**6).replayed
    left_out = with_replay(RunConfig(), H100, tight, tight.at_speed(2.0), 10**6)
    assert left_out.fits and not left_out.replayed
    assert replay_reason(RunConfig(), H100, left_out) == "off: there is no memory for it"
    forced = with_replay(RunConfig(cuda_graph=True), H100, tight, tight.at_speed(2.0), 10**6)
    assert forced.replayed and not forced.fits


def test_a_graph_for_which_there_is_no_memory_has_its_remedy() -> None:
    def simulate(config: Any, choices: Any, layers: int, *_: Any) -> StepTrace:
        forward = Segment("forward", 0, 0, (), HOST_LIMITED["forward"])
        return StepTrace(layers, (Segment("weights", 0, -1, (10**9,)), forward))

    config, spec = RunConfig(max_length=1024, load_in_4bit=False), SPEC
    issued = plan_training(config, None, None, spec, H100, simulate)
    needed = issued.memory.process_bytes - issued.memory.components["CUDA graph"] // 2
    tight = H100.model_copy(update={"total_bytes": int(needed / 0.9)})
    forced = plan_training(config.model_copy(update={"cuda_graph": True}), None, None, spec, tight, simulate)
    assert not forced.fits
    assert "cuda_graph: auto fits" in forced.remedies


def test_a_replayed_step_takes_as_long_as_the_device_and_what_is_around_it_is_issued_as_ever() -> None:
    around = {"states": Work(calls=5_000), **HOST_LIMITED}
    replayed_s = recorded_step_s(around, H100, span_tokens=512, replayed=True)
    assert replayed_s == pytest.approx(recorded_step_s({"states": Work(calls=5_000)}, H100, span_tokens=512), rel=0.01)
    heavy = {"forward": replace(GPU_LIMITED["forward"], calls=0)}
    assert recorded_step_s(heavy, H100, span_tokens=512, replayed=True) == recorded_step_s(heavy, H100, span_tokens=512)


def test_a_plan_in_closed_form_replays_nothing() -> None:
    config = RunConfig(max_length=1024)
    found = plan_training(config, None, None, SPEC, H100)
    assert not found.choices.cuda_graph
    assert found.reasons["cuda_graph"] == "off: the step was not simulated"
    wanted = plan_training(config.model_copy(update={"cuda_graph": True}), None, None, SPEC, H100)
    assert "not replayed as a CUDA graph: the step was not simulated" in wanted.warnings


def test_no_gain_is_claimed_where_there_is_none() -> None:
    one = simulated(4, 1, budget_gib=40)
    same = with_replay(RunConfig(), H100, one, one, trained=10)
    assert (same.replayed, same.replay_gain, same.tokens_per_s) == (False, 0.0, one.tokens_per_s)
