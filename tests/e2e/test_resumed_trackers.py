"""A run that is killed and resumed is one run with one set of curves in every tracker, as their own readers see it."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from laras.cli.main import app
from laras.config import RunConfig
from laras.training import trackers
from tiny_models import base_model

pytest.importorskip("wandb")
pytest.importorskip("trackio")

WORDS = ["sea", "sun", "tree", "salt", "rain", "road", "bird", "snow", "lamp", "door", "fish", "wind"]
CONFIG = """\
model_name_or_path: model
dataset: chats.jsonl
run_name: run
max_steps: 120
per_device_train_batch_size: 4
effective_batch_size: 4
logging_steps: 4
eval_steps: 40
save_steps: 20
early_stopping_patience: null
learning_rate: 0.001
report_to: [tensorboard, wandb, trackio]
"""
Curves = dict[str, dict[int, list[float]]]  # metric → step → every value that was logged there


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that was killed between two checkpoints, and resumed."""
    folder = tmp_path_factory.mktemp("tracked")
    base_model("llama", folder / "model")
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for number in range(60):
            said, told = f"what is {WORDS[number % 12]} {number}", f"a {WORDS[number // 12]}, {number} times over"
            turns = [{"role": "user", "content": said}, {"role": "assistant", "content": told}]
            file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "laras.yaml").write_text(CONFIG, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_PROJECT", "resumed")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        # A client of its own, not one shared with this process, which would outlive the kill and keep the run's id.
        own = {name: value for name, value in os.environ.items() if "WANDB" not in name or name == "WANDB_MODE"}
        killed = subprocess.Popen(
            [sys.executable, "-m", "laras", "train", "laras.yaml"], stderr=subprocess.PIPE, env=own
        )
        metrics = folder / "runs" / "run" / "logs" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while last_step(metrics) < 24:
            assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[1].decode()
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        killed.stderr.close()  # type: ignore[union-attr]
        assert last_step(metrics) < 120, "it was killed too late"
        # In this process, so that a busy machine gets more time than a person would want to wait for a tracker.
        patch.setattr(trackers, "START_LIMIT_S", 120.0)
        patch.setattr(trackers, "END_LIMIT_S", 120.0)
        done = CliRunner().invoke(app, ["resume", "runs/run"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert ": off (" not in done.output, done.output
        yield folder / "runs" / "run"


def last_step(metrics: Path) -> int:
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def expected_curves(run: Path) -> Curves:
    curves: Curves = {}
    for line in (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for key in values.keys() - {"epoch", "time_s"}:
            if values[key] is not None:
                curves.setdefault(key, {}).setdefault(step, []).append(values[key])
    return curves


def assert_same(found: Curves, run: Path) -> None:
    """Every value once, but for what a clock or the machine decides, whose steps are the same."""
    expected = expected_curves(run)
    assert set(found) == set(expected)
    for name, points in expected.items():
        assert list(found[name]) == list(points), name
        assert all(len(values) == len(points[step]) for step, values in found[name].items()), name
        if name != "tokens_per_s" and not name.startswith("memory/"):
            for step, values in points.items():
                assert found[name][step] == pytest.approx(values, rel=1e-6), (name, step)


def test_tensorboard_has_one_run_with_config_and_plan(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run / "logs" / "tensorboard"
    assert len(list(folder.iterdir())) == 2
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found: Curves = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(name, {}).setdefault(event.step, []).append(event.value)
    assert_same(found, run)
    texts = {
        tag: [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }
    ((config,), (plan,)) = texts["config/text_summary"], texts["plan/text_summary"]
    assert [key for key in RunConfig.model_fields if f"| {key} |" not in config and f"| {key}." not in config] == []
    assert "| lora_r | 8 | " in plan and "| memory.train_peak_allocated_bytes | " in plan


def test_trackio_has_one_run_with_config_and_plan_and_no_step_twice(run: Path) -> None:
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "resumed.db") as connection:
        ((run_id, name),) = connection.execute("SELECT DISTINCT run_id, run_name FROM metrics").fetchall()
        rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY step, id").fetchall()
        ((config,),) = connection.execute("SELECT config FROM configs WHERE run_id = ?", (run_id,)).fetchall()
    assert name.startswith("run-")
    found: Curves = {}
    for step, text in rows:
        for key, value in json.loads(text).items():
            found.setdefault(key, {}).setdefault(step, []).append(value)
    assert_same(found, run)
    assert {"learning_rate": 0.001, "split.test": "auto", "plan.lora_r": 8}.items() <= json.loads(config).items()


def test_wandb_has_one_id_with_config_and_plan_and_the_same_values_where_sessions_overlap(run: Path) -> None:
    files = sorted((run / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    (run_id,) = {path.stem.removeprefix("run-") for path in files}
    assert json.loads((run / "logs" / "trackers.json").read_text())["wandb"] == run_id
    assert len(files) in (1, 2)  # a client that is killed at once has not begun its file
    merged: Curves = {}
    configs = []
    for path in files:
        session, config = wandb_session(path)
        configs.append(config)
        for name, points in session.items():
            for step, value in points.items():
                if name != "tokens_per_s" and not name.startswith("memory/") and step in merged.get(name, {}):
                    assert merged[name][step] == pytest.approx([value], rel=1e-6), (name, step)
                merged.setdefault(name, {})[step] = [value]
    assert_same(merged, run)
    assert configs[0] in ({}, configs[-1])  # or has written nothing to it
    assert {"learning_rate": 0.001, "split.test": "auto", "plan.lora_r": 8}.items() <= configs[-1].items()
    (table,) = files[-1].parent.glob("files/media/table/plan_*.json")
    content = json.loads(table.read_text(encoding="utf-8"))
    assert content["columns"] == ["choice", "value", "reason"]
    assert ["lora_r", "8"] in [row[:2] for row in content["data"]]


def wandb_session(path: Path) -> tuple[dict[str, dict[int, float]], dict[str, Any]]:
    """Curves and configuration of one offline file."""
    from wandb.proto.wandb_internal_pb2 import Record

    curves: dict[str, dict[int, float]] = {}
    config: dict[str, Any] = {}
    for data in wandb_log(path):
        record = Record.FromString(data)
        if record.HasField("run"):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            step = items.get("_step", record.history.step.num)
            for key, value in items.items():
                if not key.startswith(("_", "plan/")) and isinstance(value, int | float) and math.isfinite(value):
                    curves.setdefault(key, {})[step] = value
    config.pop("_wandb", None)
    return curves, config


def wandb_log(path: Path) -> Iterator[bytes]:
    """The records of the client's file: LevelDB's log format behind a header of seven bytes."""
    data, block, place = path.read_bytes(), 32768, 7
    parts: list[bytes] = []
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:
            return
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield b"".join(parts)
            parts = []
