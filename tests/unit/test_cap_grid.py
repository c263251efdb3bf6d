"""The search under memory caps finds the best of the grid, goes on where it stopped, and runs the real step."""

from pathlib import Path

import pytest


@pytest.fixture
def grid(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import cap_grid

    return cap_grid


GIB_IN_MIB = 1024


@pytest.fixture
def world(grid):
    """Settings with their seconds and GiB; what does not fit under a cap runs out of memory."""
    facts = {
        grid.Setting(8, 2, "none"): (1.0, 60),
        grid.Setting(4, 4, "none"): (1.1, 35),
        grid.Setting(4, 4, "full"): (1.5, 12),
        grid.Setting(1, 16, "full"): (2.0, 8),
    }
    ran = []

    def run(setting, cap):
        ran.append((setting, cap))
        seconds, needed = facts[setting]
        # Near the cap fragmentation decides: 35 GiB of tensors do not fit into 36.
        return grid.Outcome(None if cap is not None and needed > cap - 2 else seconds, needed * GIB_IN_MIB)

    return facts, ran, run


def plan_of(setting, fits=True):
    from dataclasses import asdict

    return {"fits": fits, "setting": asdict(setting)}


def test_the_best_under_a_cap_is_the_fastest_that_does_not_run_out(grid, world):
    facts, ran, run = world
    subject, settings = grid.Subject("m", four_bit=False), list(facts)
    plans = {
        "m|lora|79": plan_of(settings[0]),
        "m|lora|36": plan_of(settings[2]),
        "m|lora|5": plan_of(settings[3], False),
    }
    done = {}
    rows = list(grid.search(subject, settings, plans, (5, 36, 79), run, done))
    assert [cap for _, cap in ran] == [36, 79] + [None] * 4 + [36]
    assert [setting for setting, cap in ran[:2]] == [settings[2], settings[0]]  # plans first: do they hold?
    assert ran[6][0] == settings[1]  # runs out, so that the plan is the best as well
    from cap_grid_report import table

    lines = table(plans, {row["key"]: row for row in rows})
    assert lines[2].endswith("| yes |")
    assert "100.0% | yes" in lines[3]
    assert "yes: nothing fits" in lines[4]


def test_a_plan_that_is_slow_or_runs_out_is_said(grid, world):
    facts, _, run = world
    subject, settings = grid.Subject("m", four_bit=True), list(facts)
    plans = {"m|qlora|79": plan_of(settings[3]), "m|qlora|36": plan_of(settings[0])}
    rows = {row["key"]: row for row in grid.search(subject, settings, plans, (36, 79), run, {})}
    from cap_grid_report import table

    slow, out = table(plans, rows)[2:]
    assert slow.endswith("50.0% | **no** |")
    assert "out of memory" in out
    assert out.endswith("**no** |")


def test_a_search_goes_on_where_it_stopped(grid, world):
    facts, ran, run = world
    subject, settings = grid.Subject("m", four_bit=False), list(facts)
    plans = {"m|lora|79": plan_of(settings[0])}
    done = {}
    half = [row for _, row in zip(range(3), grid.search(subject, settings, plans, (79,), run, done), strict=False)]
    assert len(ran) == len(half) == 3
    rest = list(grid.search(subject, settings, plans, (79,), run, {row["key"]: row for row in half}))
    assert len(ran) == 5
    assert {row["key"] for row in half}.isdisjoint(row["key"] for row in rest)


def test_the_grid_is_the_planners_and_its_settings_run(grid, monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path))
    tiny = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256,
        "max_position_embeddings": 256, "pad_token_id": 0,
    }  # fmt: skip
    monkeypatch.setitem(grid.MODELS, "tiny", tiny)
    monkeypatch.setattr(grid, "MAX_LENGTH", 32)
    monkeypatch.setattr(grid, "EFFECTIVE", 4)
    monkeypatch.setattr(grid, "TIMED_S", 0.0)
    subject = grid.Subject("tiny", four_bit=False)
    settings = grid.grid_of(subject, length=32)
    assert {setting.kind for setting in settings} == {"none", "selective", "full", "offload"}
    assert {(setting.micro, setting.accumulation) for setting in settings} == {(1, 4), (2, 2), (4, 1)}
    row = grid.plan_row(subject, 15, length=32)
    assert row["fits"]
    assert grid.Setting(**row["setting"]) in settings
    rows = {one["key"]: one for one in grid.predicted_rows(subject, length=32)}
    assert set(rows) == {f"tiny|lora|{setting.key}" for setting in settings}
    made = []
    monkeypatch.setattr(grid, "optimizer_of", lambda *given: made.append(optimizer_of(*given)) or made[-1])
    optimizer_of = __import__("memory").optimizer_of
    run = grid.gpu_run(subject, 32)
    for kind in ("none", "full"):
        outcome = run(grid.Setting(2, 2, kind), 15)
        assert outcome.step_s > 0
        # One step and the timed ones: the states are this setting's own.
        assert {int(state["step"]) for state in made[0].state.values()} == {1 + grid.TIMED_STEPS}


def test_what_is_missing_is_known_without_running_anything(grid, world, monkeypatch):
    facts, _, run = world
    monkeypatch.setattr(grid, "grid_of", lambda subject: facts)
    subject, plans = grid.Subject("m", four_bit=False), {"m|lora|79": plan_of(next(iter(facts)))}
    done = {}
    rows = list(grid.search(subject, list(facts), plans, grid.CAPS_GIB, run, done))
    assert not grid.is_missing(subject, plans, done)
    assert not grid.lacks_its_plans(subject, plans, done)
    assert grid.lacks_its_plans(subject, plans, {})
    for row in rows:
        assert grid.is_missing(subject, plans, {key: one for key, one in done.items() if key != row["key"]})


def test_the_report_says_how_far_off_predictions_are_and_leaves_out_what_is_not_a_settings_own(grid, tmp_path):
    from cap_grid_report import report

    setting = {"micro": 4, "accumulation": 4, "kind": "full"}
    found = {
        "m|lora|free|4x4|full": {"setting": setting, "step_s": 1.0, "allocated_MiB": 1000.0, "reserved_MiB": None},
        "m|lora|79|4x4|full": {"setting": setting, "step_s": 1.1, "allocated_MiB": 1000.0, "reserved_MiB": 1500.0},
    }
    found = {key: {"key": key, **row} for key, row in found.items()}
    plans = {"m|lora|79": plan_of(grid.Setting(**setting))}
    predicted = {"m|lora|4x4|full": {"allocated_MiB": 1010.0}, "m|lora|4x4|none": {"allocated_MiB": 1.0}}
    report(plans, found, predicted, tmp_path / "grid.md")
    text = (tmp_path / "grid.md").read_text()
    assert "| m, lora | 4x4, full | 1.000 | 1,000 | +1.00% | - |" in text
    assert "over 1 of the 2 settings" in text
    assert "+10% to +10% longer" in text
