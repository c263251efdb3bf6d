"""Without a way to the Hub, what its cache holds is used at once, and what it lacks is a clear error."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny_models import base_model

COMMIT = "a" * 40
SCRIPT = """
import time
from laras.errors import LarasError
from laras.models.loader import load_model, load_tokenizer
from laras.planning.architecture import load_model_spec
from laras.data.sources import load_tables

started = time.monotonic()
def told(work):
    try:
        work()
        print("there")
    except LarasError as error:
        print(int(error.exit_code), " ".join(str(error).split()))
for name in ("owner/tiny", "owner/absent"):
    told(lambda: load_model_spec(name))
    told(lambda: load_tokenizer(name))
    told(lambda: load_model(name, precision="fp32"))
told(lambda: load_tables("owner/absent", None))
print(time.monotonic() - started)
"""


@pytest.mark.slow
def test_without_a_way_to_the_hub_its_cache_serves_and_what_is_not_there_is_named(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--owner--tiny"
    base_model("llama", cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}  # refuses at once
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, elapsed_s = done.stdout.splitlines()
    assert lines[:3] == ["there"] * 3
    for line, code in zip(lines[3:], "2223", strict=True):
        assert line.startswith(f"{code} ") and "owner/absent" in line and "hint: " in line and "network" in line, line
    assert all("127.0.0.1:9 does not answer, and its cache lacks this" in line for line in lines[3:6])
    assert "Retry" not in done.stderr
    assert float(elapsed_s) < time.monotonic() - started
    assert float(elapsed_s) < 60  # the client's own retries take four minutes
