"""A plan reads well in a terminal of any width, without colour."""

import pytest

from laras.cli.plan import _SHOWN, show_plan
from laras.config import RunConfig
from laras.planning.architecture import model_spec_from_config
from laras.planning.catalogue import find_gpu
from laras.planning.planner import plan_training

WIDE = model_spec_from_config(
    {
        "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768,
    },
    "m",
)  # fmt: skip
SPEC = model_spec_from_config(
    {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "meta-llama/Llama-3.1-8B",
)  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("keys", [{}, {"load_in_4bit": False}], ids=["fits", "does not fit"])
def test_choices_stand_whole_on_lines_that_fit(monkeypatch, capsys, width, keys):
    monkeypatch.setenv("COLUMNS", str(width))
    plan = plan_training(RunConfig(max_length=2048, **keys), None, None, SPEC, find_gpu("t4").to_hardware())
    show_plan(plan)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for name in _SHOWN:
        shown = getattr(plan.choices, name) is not None
        assert sum(line.startswith(f"{name}: ") for line in lines) == shown, name
    assert "load_in_4bit: true" in "\n".join(lines) if not keys else any(line.endswith(" fits") for line in lines)
    assert "\x1b" not in "\n".join(lines)
    reasons = [line.partition(": ")[2] for line in lines if line.startswith(_SHOWN)]
    assert all(len(reason) > 10 for reason in reasons)


def test_main_memory_that_a_plan_takes_is_shown(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    plan = plan_training(RunConfig(max_length=16384), None, None, WIDE, find_gpu("rtx 3060").to_hardware())
    show_plan(plan)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    shown = next(line for line in lines if "held beside it" in line)
    assert shown.endswith(f"{plan.memory.host_bytes / 2**30:.2f} GiB")
    kinds = [one.checkpoint_kind for one in plan.alternatives[:2] if one.gradient_checkpointing]
    assert kinds
    assert all(any(kind in line.split() for line in lines) for kind in kinds)
