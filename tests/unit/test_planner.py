"""The plan is the fastest that fits, respects what is forced, and says why."""

import time
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoConfig

from laras.config import RunConfig
from laras.data.analyze import length_stats
from laras.data.pack import pack_documents
from laras.errors import ConfigError
from laras.models.parameters import count_parameters
from laras.models.simulation import trace_step
from laras.planning import simulated
from laras.planning.architecture import load_model_spec, model_spec_from_config
from laras.planning.candidates import candidates, device_budget_bytes
from laras.planning.catalogue import find_gpu
from laras.planning.counts import with_counts
from laras.planning.hardware import cpu_hardware
from laras.planning.memory import context_bytes
from laras.planning.planner import _eval_steps, _time, plan_training
from laras.planning.throughput import RATES, recorded_step_s
from laras.planning.trace import Segment, StepTrace
from laras.planning.work import Work
from laras.planning.workload import LargestBatch, Workload, workload
from laras.records import DatasetProfile
from laras.training.batches import TokenRows, TrainBatches


def spec_of(hidden=4096, layers=32):
    keys = {"num_attention_heads": 32, "vocab_size": 128256, "max_position_embeddings": 8192}
    return model_spec_from_config(
        {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, **keys}, "m"
    )


def plan(gpu="h100", spec=None, **keys):
    hardware = find_gpu(gpu).to_hardware() if gpu else cpu_hardware()
    return plan_training(RunConfig(max_length=1024, **keys), None, None, spec or spec_of(), hardware)


@pytest.mark.parametrize("gpu", ["t4", "rtx 4090", "a100 40gb", "h100", "h200"])
def test_the_plan_is_the_fastest_that_fits(gpu):
    result = plan(gpu)
    assert result.fits
    assert result.memory.train_peak_reserved_bytes <= result.memory.device_budget_bytes
    same_weights = [a for a in result.alternatives if a.load_in_4bit == result.choices.load_in_4bit]
    assert all(a.tokens_per_s <= result.time.tokens_per_s for a in same_weights if a.fits)
    assert result.choices.per_device_train_batch_size * result.choices.gradient_accumulation_steps == 16


@pytest.mark.parametrize("processes", ["2", "4"])
def test_every_process_has_as_much_to_do(processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert plan().choices.gradient_accumulation_steps % int(processes) == 0
    forced = plan(per_device_train_batch_size=16).choices
    assert (forced.per_device_train_batch_size, forced.gradient_accumulation_steps) == (16, 1)


def test_precision_follows_what_the_card_really_computes():
    assert plan("t4").choices.precision == "fp16"
    assert plan("l4").choices.precision == "bf16"
    assert plan("t4", precision="fp32").choices.precision == "fp32"


@pytest.mark.parametrize(
    ("hidden", "layers", "rank", "rslora"), [(512, 4, 8, False), (2048, 16, 16, False), (4096, 32, 32, True)]
)
def test_rank_follows_the_real_size(hidden, layers, rank, rslora):
    choices = plan(spec=spec_of(hidden, layers)).choices
    assert (choices.lora_r, choices.lora_alpha, choices.use_rslora) == (rank, 2 * rank, rslora)


def test_forced_values_are_respected():
    forced = {
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": True,
        "load_in_4bit": True,
        "lora_r": 5,
        "optim": "adamw_8bit",
        "loss_kind": "chunked",
    }
    result = plan(**forced)
    assert {key: getattr(result.choices, key) for key in forced} == forced
    assert result.reasons["load_in_4bit"] == "as configured"
    assert plan(gradient_accumulation_steps=4).choices.per_device_train_batch_size == 4


def test_remedies_of_what_cannot_fit_do_fit():
    small = {"per_device_train_batch_size": 1}
    result = plan("t4", load_in_4bit=False, **small)
    assert not result.fits
    assert result.warnings
    assert "load_in_4bit: true fits" in result.remedies
    assert plan("t4", load_in_4bit=True, **small).fits
    card = next(text for text in result.remedies if text.endswith("GB) fits"))
    assert plan(card.split(" (")[0], load_in_4bit=False, **small).fits
    assert "finetuning_type: lora fits" in plan("t4", finetuning_type="full").remedies


def wide_spec():
    keys = {"num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 13824, "vocab_size": 152064}
    shape = {"hidden_size": 5120, "num_hidden_layers": 48, "max_position_embeddings": 32768}
    return model_spec_from_config({"model_type": "qwen2", **shape, **keys}, "m")


def plan_beside(gpu, main_memory_gib=None, **keys):
    hardware = find_gpu(gpu).to_hardware()
    if main_memory_gib is not None:
        hardware = hardware.model_copy(update={"host_available_bytes": int(main_memory_gib * 2**30)})
    return plan_training(RunConfig(**keys), None, None, wide_spec(), hardware)


@pytest.mark.parametrize("checkpointing", ["auto", True])
def test_inputs_of_layers_go_to_main_memory_where_nothing_else_makes_the_run_fit(checkpointing):
    result = plan_beside("rtx 4060 ti 16gb", max_length=8192, gradient_checkpointing=checkpointing)
    assert result.fits
    assert (result.choices.gradient_checkpointing, result.choices.checkpoint_kind) == (True, "offload")
    tokens = result.choices.per_device_train_batch_size * 8192
    inputs = 47 * tokens * 5120 * 2
    assert inputs <= result.memory.host_bytes < 2 * inputs
    assert "of main memory hold the inputs" in result.reasons["gradient_checkpointing"]
    assert ("as configured" in result.reasons["gradient_checkpointing"]) == (checkpointing is True)


def test_main_memory_is_a_limit_and_more_of_it_a_remedy_that_works():
    keys = {"gpu": "rtx 4060 ti 16gb", "max_length": 8192}
    assert plan_beside(**keys, main_memory_gib=64).choices.checkpoint_kind == "offload"
    small = plan_beside(**keys, main_memory_gib=4)
    assert not small.fits
    assert small.memory.host_bytes == 0
    assert "of which 2.00 GiB may be taken" in small.reasons["gradient_checkpointing"]
    remedy = next(text for text in small.remedies if "main memory" in text)
    assert remedy.endswith("of free main memory instead of 4.00 GiB fits")
    assert plan_beside(**keys, main_memory_gib=float(remedy.split()[0]) + 0.1).fits


def test_a_simulated_plan_still_says_how_much_main_memory_it_takes(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path))

    def simulate(config, choices, layers, *_):
        weights = 10**9 if choices.checkpoint_kind == "offload" else 10**12
        forward = Segment("forward", 0, 0, (10**6, -2), Work(calls=1000, moved_bytes=10**6))
        return StepTrace(layers, (Segment("weights", 0, -1, (weights,)), forward))

    hardware = find_gpu("rtx 4060 ti 16gb").to_hardware()
    result = plan_training(RunConfig(max_length=8192), None, None, wide_spec(), hardware, simulate)
    assert (result.memory.method, result.choices.checkpoint_kind) == ("simulation", "offload")
    assert result.memory.host_bytes > 0


def test_main_memory_is_not_taken_for_a_gain_that_nobody_sees():
    result = plan_beside("rtx 4090", max_length=16384)
    sizes = [one for one in result.alternatives if one.fits and one.checkpoint_kind == "offload"]
    assert result.choices.checkpoint_kind == "full"
    assert any(result.time.tokens_per_s < one.tokens_per_s < 1.01 * result.time.tokens_per_s for one in sizes)


def test_what_fits_on_the_card_at_the_same_size_stays_there():
    config = RunConfig(max_length=4096, load_in_4bit=True)
    work = workload(config, None, None, wide_spec())
    found = candidates(config, wide_spec(), find_gpu("l4").to_hardware(), "bf16", work)
    by_size = {}
    for one in found:
        by_size.setdefault(one.case.micro_batch, {})[one.case.checkpoint_kind] = one
    for kinds in by_size.values():
        assert kinds["offload"].tokens_per_s < kinds["full"].tokens_per_s < 1.02 * kinds["offload"].tokens_per_s
        assert kinds["offload"].memory.train_peak_allocated_bytes < kinds["full"].memory.train_peak_allocated_bytes
    assert not any(
        one.case.checkpoint_kind == "offload"
        for one in candidates(
            config.model_copy(update={"load_in_4bit": False}), wide_spec(), cpu_hardware(), "fp32", work
        )
    )


def test_full_precision_comes_before_speed():
    assert not plan("a100 40gb").choices.load_in_4bit
    assert plan("t4").choices.load_in_4bit


def test_packing_keeps_the_tokens_of_an_optimizer_step():
    choices = plan("h100").choices
    assert choices.packing
    tokens = choices.per_device_train_batch_size * choices.gradient_accumulation_steps * choices.max_length
    assert abs(tokens / (16 * 1024) - 1) <= 0.05
    assert plan("t4").choices.packing is False
    assert plan("t4").reasons["packing"].startswith("off: ")


def lognormal(count=4000, median=350.0, spread=0.9, longest=4096):
    rng = np.random.default_rng(5)
    lengths = np.clip(rng.lognormal(np.log(median), spread, count).astype(int), 8, longest)
    lengths[0] = longest
    return lengths


def plan_of(lengths, gpu="h100", **keys):
    stats = length_stats(lengths, np.maximum(1, lengths // 2))
    profile = DatasetProfile.model_construct(tokens=stats)
    return plan_training(
        RunConfig(max_length=4096, **keys), profile, None, spec_of(1024, 8), find_gpu(gpu).to_hardware()
    )


def planned_on(lengths, gpu="h100", **keys):
    stats = length_stats(lengths, np.maximum(1, lengths // 2))
    profile = DatasetProfile.model_construct(tokens=stats)
    work = workload(RunConfig(max_length=4096, **keys), profile, None, spec_of(1024, 8))
    return plan_of(lengths, gpu, **keys).choices, work


@pytest.mark.parametrize("effective", [4, 16, 64, 500])
@pytest.mark.parametrize("spread", [0.2, 0.9])
def test_bins_hold_what_an_optimizer_step_asks_for_and_the_longest_example_in_any_case(effective, spread):
    """One example of 4,096 tokens among many of 350 does not end packing, nor change how much a step learns from."""
    lengths = lognormal(spread=spread)
    choices, work = planned_on(lengths, effective_batch_size=effective)
    if effective * lengths.mean() < 0.85 * 4096:
        assert not choices.packing
        return
    assert choices.packing and choices.packed_tokens >= 4096
    bins = pack_documents(lengths.tolist(), choices.packed_tokens, seed=1)
    examples_a_step = len(lengths) / len(bins) * choices.gradient_accumulation_steps
    assert examples_a_step == pytest.approx(effective, rel=0.15 if effective * lengths.mean() < 4096 else 0.06)
    assert work.bin_fill(choices.packed_tokens) == pytest.approx(
        lengths.sum() / (len(bins) * choices.packed_tokens), abs=0.03
    )


def test_a_bin_that_a_long_example_does_not_share_is_known_to_be_half_empty():
    lengths = np.concatenate([np.full(1000, 3000), [4096]])
    choices, work = planned_on(lengths, effective_batch_size=32)
    assert work.bin_fill(4096) == pytest.approx(3000 / 4096, abs=0.02)
    bins = pack_documents(lengths.tolist(), choices.packed_tokens, seed=1)
    assert len(lengths) / len(bins) * choices.gradient_accumulation_steps == pytest.approx(32, rel=0.06)


def test_rows_that_are_given_make_the_bin_and_so_does_accumulation():
    choices, _ = planned_on(lognormal(), effective_batch_size=64, per_device_train_batch_size=2)
    assert (choices.per_device_train_batch_size, choices.packed_tokens) == (2, 8192)
    choices, work = planned_on(lognormal(), effective_batch_size=64, gradient_accumulation_steps=2)
    assert choices.gradient_accumulation_steps == 2
    found = 2 * choices.packed_tokens * work.bin_fill(choices.packed_tokens)
    assert found == pytest.approx(work.step_tokens, rel=0.05)


def test_sizes_that_are_given_do_not_let_packing_change_the_effective_batch():
    """16 examples of 350 tokens in 4 x 4 rows are not 4 bins of 4 x 4,096 tokens."""
    result = plan_of(lognormal(), per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert not result.choices.packing and not result.warnings
    assert "4 x 16384 tokens" in result.reasons["packing"]
    assert result.reasons["gradient_accumulation_steps"] == "keeps 16 examples an optimizer step"


@pytest.mark.parametrize(
    "sizes",
    [
        {"per_device_train_batch_size": 8, "packing": True},
        {"gradient_accumulation_steps": 4, "packing": True},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "packing": False},
    ],
)
def test_an_effective_batch_that_cannot_be_kept_is_told(sizes):
    lengths = lognormal()
    result = plan_of(lengths, **sizes)
    choices = result.choices
    assert {name: getattr(choices, name) for name in sizes} == sizes
    examples = choices.per_device_train_batch_size * choices.gradient_accumulation_steps
    if choices.packing:
        bins = pack_documents(lengths.tolist(), choices.packed_tokens, seed=1)
        examples = len(lengths) / len(bins) * choices.gradient_accumulation_steps
    (warning,) = result.warnings
    told = int(warning.removeprefix("an optimizer step has ").partition(" ")[0])
    assert told == pytest.approx(examples, rel=0.06)
    assert result.reasons["gradient_accumulation_steps"].startswith(f"{told} examples an optimizer step")
    assert result.time.total_s * result.time.tokens_per_s == pytest.approx(
        result.total_steps * examples * lengths.mean(), rel=0.06
    )
    assert result.total_steps == pytest.approx(3 * len(lengths) / examples, rel=0.1)


def test_full_fine_tuning_pages_its_states_only_when_exact_ones_do_not_fit():
    small, large = spec_of(1024, 8), spec_of(5120, 40)
    assert plan("h100", spec=small, finetuning_type="full").choices.optim == "adamw_torch_fused"
    paged = plan("h100", spec=large, finetuning_type="full")
    assert paged.choices.optim == "paged_adamw_8bit"
    assert "do not fit" in paged.reasons["optim"]


def test_a_model_that_cannot_be_simulated_is_planned_by_the_closed_form_with_a_margin():
    def cannot(*_):
        raise ConfigError("m cannot be simulated: no meta kernel")

    config = RunConfig(max_length=1024, model_name_or_path="m")
    result = plan_training(config, None, None, spec_of(), find_gpu("l4").to_hardware(), cannot)
    assert result.memory.method == "closed-form"
    assert "cannot be simulated" in result.warnings[0]
    assert result.memory.train_peak_reserved_bytes <= 0.9 * result.memory.device_budget_bytes


def test_what_a_plan_leaves_free_is_a_share_and_more_where_others_are():
    def left(card, **keys):
        free = card.total_bytes - card.other_processes_bytes - context_bytes(card)
        return free - device_budget_bytes(RunConfig(**keys), card)

    card, mib = find_gpu("h100").to_hardware(), 2**20
    assert left(card) == pytest.approx(0.02 * card.total_bytes, abs=1)
    small = card.model_copy(update={"total_bytes": 8 * 2**30})
    assert left(small) == 256 * mib
    shared = small.model_copy(update={"other_processes_bytes": 400 * mib})
    assert left(shared) == (256 + 100) * mib
    assert left(card.model_copy(update={"count": 2})) == pytest.approx(0.05 * card.total_bytes, abs=1)
    assert left(card, memory_budget_fraction=0.5) == pytest.approx(0.5 * card.total_bytes, abs=1)
    machine = cpu_hardware()
    available = machine.total_bytes - machine.other_processes_bytes
    assert left(machine) == pytest.approx(0.1 * available, abs=1)


def test_a_cpu_trains_in_fp32_without_packing_or_4bit():
    choices = plan(None, spec=spec_of(64, 2)).choices
    assert (choices.precision, choices.optim, choices.packing, choices.load_in_4bit) == (
        "fp32",
        "adamw_torch",
        False,
        False,
    )


def test_equal_inputs_give_equal_plans():
    assert plan().digest() == plan().digest()


def test_the_predicted_time_includes_every_validation():
    work = Workload(100, 50.0, 50.0, 100, step_tokens=200.0, validation_tokens=1000.0, target_share=1.0, stats=None)
    # 10 steps of 200 tokens, and validations after 4, 8 and 10 that cost half as much a token.
    assert _time(work, 10, 4, 100.0, step_tokens=200.0).total_s == pytest.approx((10 * 200 + 3 * 500) / 100)


def test_a_family_that_nobody_has_looked_at_is_not_packed_and_gets_adapters_on_what_it_has():
    keys = {"num_attention_heads": 32, "vocab_size": 65024, "hidden_size": 4096, "num_hidden_layers": 32}
    strange = model_spec_from_config({"model_type": "strange", **keys}, "m")
    result = plan(spec=strange)
    assert not result.choices.packing and "strange is not known to keep" in result.reasons["packing"]
    assert result.choices.target_modules == ("all-linear",)
    forced = plan(spec=strange, packing=True)
    assert forced.choices.packing and any("may see each other" in warning for warning in forced.warnings)


def test_a_plan_for_any_length_and_batch_is_made_at_once():
    spec = spec_of().model_copy(update={"max_position_embeddings": 10_000_000})

    def never(*_):
        raise AssertionError("what is hopeless in closed form is not simulated")

    for keys in ({"max_length": 10_000_000}, {"max_length": 8, "effective_batch_size": 1_000_000}):
        started = time.process_time()
        simulate = never if keys["max_length"] > 8 else None
        plan_training(RunConfig(**keys), None, None, spec, find_gpu("t4").to_hardware(), simulate)
        assert time.process_time() - started < 3


def test_of_candidates_about_as_fast_the_simulated_steps_decide(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path))
    seen = []

    def simulate(config, choices, layers, hardware, documents, largest):
        seen.append(choices.per_device_train_batch_size)
        # Everything fits; the second one asked for has a tenth of the host's work.
        work = Work(calls=10_000 if len(seen) == 1 else 1_000, moved_bytes=10**6)
        return StepTrace(layers, (Segment("weights", 0, -1, (10**9,)), Segment("forward", 0, 0, (10**6, -2), work)))

    config = RunConfig(max_length=1024, cuda_graph=False)
    result = plan_training(config, None, None, spec_of(), find_gpu("h100").to_hardware(), simulate)
    assert len(seen) == 2
    assert result.choices.per_device_train_batch_size == seen[1]
    assert result.memory.method == "simulation"
    assert all(other.tokens_per_s <= result.time.tokens_per_s for other in result.alternatives if other.fits)


def test_a_step_that_a_busy_host_would_slow_gives_way_to_one_that_it_would_not(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path))
    hardware, first = find_gpu("h100").to_hardware(), []

    def simulate(config, choices, layers, *_):
        tokens = choices.packed_tokens or choices.per_device_train_batch_size * choices.max_length
        device = Work(moved_bytes=2 * 10**6 * tokens)
        first.append(choices.per_device_train_batch_size)
        if len(first) == 1:  # as long on the host as on the device
            seconds = recorded_step_s({"forward": device}, hardware, span_tokens=1)
            device = replace(device, calls=int(seconds / RATES.call_s))
        else:
            device = replace(device, moved_bytes=int(1.03 * device.moved_bytes))
        return StepTrace(layers, (Segment("weights", 0, -1, (10**9,)), Segment("forward", 0, 0, (10**6, -2), device)))

    config = RunConfig(max_length=1024, cuda_graph=False)
    result = plan_training(config, None, None, spec_of(), hardware, simulate)
    assert len(first) == 2 and result.choices.per_device_train_batch_size == first[1]
    assert "the fastest that fits, where the host has other work too" in result.reasons.values()


def test_weights_that_are_too_large_by_themselves_are_simulated_once(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path))
    seen = []

    def simulate(config, choices, layers, hardware, documents, largest):
        seen.append(choices.load_in_4bit)
        weights = 10**10 if choices.load_in_4bit else 10**11  # as of a model that the closed form underrates
        forward = Segment("forward", 0, 0, (10**6, -2), Work(calls=1000, moved_bytes=10**6))
        return StepTrace(layers, (Segment("weights", 0, -1, (weights,)), forward))

    hardware = find_gpu("h100").to_hardware()
    result = plan_training(RunConfig(max_length=1024), None, None, spec_of(), hardware, simulate)
    assert result.fits and result.choices.load_in_4bit
    assert seen.count(False) == 1


def test_a_plan_that_was_made_before_is_read_and_another_capacity_takes_the_same_trace(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path))
    seen, replays = [], []

    def simulate(config, choices, layers, *_):
        seen.append(choices)
        forward = Segment(
            "forward", 0, 0, (10**9, -2), Work(calls=1000, moved_bytes=10**6, products=(((8, 8, 8, 2), 1),))
        )
        return StepTrace(layers, (Segment("weights", 0, -1, (10**9,)), forward), paged=((-1, 5),))

    replay = simulated.replay
    monkeypatch.setattr(simulated, "replay", lambda *args, **places: replays.append(args) or replay(*args, **places))

    def planned(share):
        config = RunConfig(max_length=1024, memory_budget_fraction=share)
        return plan_training(config, None, None, spec_of(), find_gpu("h100").to_hardware(), simulate)

    first = planned(0.8)
    simulations, replayed = len(seen), len(replays)
    assert simulations and replayed
    again = planned(0.8)
    assert (again.memory, again.time, again.choices) == (first.memory, first.time, first.choices)
    assert (len(seen), len(replays)) == (simulations, replayed)
    assert planned(0.81).memory.device_budget_bytes > first.memory.device_budget_bytes
    assert len(seen) == simulations and len(replays) > replayed


@pytest.mark.parametrize(("steps", "validation_tokens", "expected"), [(60, 14_000, 30), (1005, 0, 101), (7, 0, 1)])
def test_validations_come_at_equal_distances_and_cost_little(steps, validation_tokens, expected):
    work = Workload(100, 50.0, 50.0, 100, 1250.0, validation_tokens, target_share=1.0, stats=None)
    assert _eval_steps(RunConfig(), work, steps) == expected


@pytest.mark.parametrize(("steps", "between"), [(15, 1), (200, 4), (2000, 10)])
def test_a_short_run_is_logged_often_enough_for_a_curve(steps, between):
    assert plan(max_steps=steps).choices.logging_steps == between
    assert plan(max_steps=steps, logging_steps=7).choices.logging_steps == 7


@pytest.mark.parametrize("packing", [False, True])
def test_the_largest_batch_is_what_the_collators_make_of_the_data_at_most(packing):
    """From every order of rows: no batch has more slots or targets than the plan takes it to have."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 203, size=40)
    targets = np.maximum(1, (lengths * rng.uniform(0.1, 0.7, size=40)).astype(int))
    stats = length_stats(lengths, targets)
    work = Workload(256, stats.mean, stats.mean, 40, 16 * stats.mean, 0, 0.4, stats, longest_validation_tokens=171)
    bin_tokens = 4 * 256 if packing else None
    largest = work.largest_batch(4, bin_tokens)
    assert largest.eval_row_tokens == 176
    labels = [np.where(np.arange(n) < n - t, -100, 1) for n, t in zip(lengths, targets, strict=True)]
    rows = Dataset.from_list([{"input_ids": np.ones(len(one), int).tolist(), "labels": one.tolist()} for one in labels])
    batches = TrainBatches(
        TokenRows(rows), micro_rows=4, micro_batches=2, max_length=256, bin_tokens=bin_tokens, seed=1, pad_token_id=0
    )
    made = [
        batches.collate(micro)
        for epoch in range(5)
        for step in range(len(batches))
        for micro in batches.step(epoch, step).micro_batches
    ]
    slots = bin_tokens or 4 * largest.row_tokens
    assert max(one["input_ids"].numel() for one in made) <= slots
    counts = [one["target_positions"].numel() if packing else int((one["labels"] != -100).sum()) for one in made]
    assert max(counts) <= largest.target_tokens < slots
    assert batches.collate(batches.longest())["input_ids"].numel() == slots


def test_without_data_every_token_of_the_longest_row_is_a_target():
    work = Workload(256, 256, 256, 0, 16 * 256, 0, 1.0, None)
    assert work.largest_batch(2) == LargestBatch(256, None, 256)


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [("mamba", {}), ("mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16})],
)
def test_a_model_of_state_space_layers_is_planned_by_its_simulated_step(model_type, keys, monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 512, "state_size": 8}
    AutoConfig.for_model(model_type, **sizes, **keys).save_pretrained(tmp_path)
    config = RunConfig(model_name_or_path=str(tmp_path), max_length=32, effective_batch_size=2)
    spec = with_counts(load_model_spec(tmp_path), config, count_parameters)
    result = plan_training(config, None, None, spec, find_gpu("h100").to_hardware(), trace_step)
    assert (result.fits, result.memory.method, result.warnings) == (True, "simulation", ())
    assert result.time.tokens_per_s > 0
