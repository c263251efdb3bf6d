"""A plan imports what it needs, once, and without what makes imports slow."""

import gc
import json
import subprocess
import sys

import pytest

from laras.models import cold_start

PLAN = """
import sys
from laras.cli.main import main
sys.argv = ["laras", "plan", "model_name_or_path=.", "max_length=128", "--gpu", "h100", "--json"]
try:
    main()
finally:
    compiler = [name for name in ("torch._inductor.compile_fx", "torch._inductor.lowering") if name in sys.modules]
    print("torch" in sys.modules, compiler, file=sys.stderr)
"""
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512,
}  # fmt: skip


def test_a_cold_plan_loads_no_compiler_and_a_warm_one_not_even_torch(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plans = []
    for last_line in ("True []", "False []"):
        ran = subprocess.run([sys.executable, "-c", PLAN], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert ran.stderr.splitlines()[-1] == last_line
        plans.append(json.loads(ran.stdout))
    assert plans[0] == plans[1]
    assert plans[0]["fits"]


@pytest.mark.parametrize("is_own", [True, False])
def test_the_collector_works_again_after_an_import(is_own, monkeypatch, tmp_path):
    (tmp_path / "imported_once.py").write_text("import gc\nwas_enabled = gc.isenabled()\n")
    (tmp_path / "cannot_be_imported.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cold_start._process, "is_own", is_own)
    frozen_before = gc.get_freeze_count()  # by tests before this one in the same process
    try:
        cold_start.load("imported_once")
        assert gc.isenabled()
        assert not sys.modules["imported_once"].was_enabled
        assert (gc.get_freeze_count() > frozen_before) is is_own  # a guest forgets nothing of its host's
        cold_start.load("cannot_be_imported")  # told by whoever imports it next
        assert gc.isenabled()
        assert "cannot_be_imported" not in sys.modules
    finally:
        gc.unfreeze()
        sys.modules.pop("imported_once", None)
