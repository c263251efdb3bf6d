"""Unsloth's layers give the plain path's losses and gradients, and a killed run on them goes on.

Everything runs in processes of its own, side by side, since Unsloth changes the one that it is imported in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from laras.records import Environment, RunResult, TrainPlan
from tiny_models import base_model
from unsloth_steps import CASES

WITH_UNSLOTH = torch.cuda.is_available() and importlib.util.find_spec("unsloth") is not None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not WITH_UNSLOTH, reason="needs a CUDA device and Unsloth")]
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}  # fmt: skip
HEADS = {"gemma": 64, "mistral": 64, "qwen3": 128}
TIMEOUT_S = 180


def started(*words: str, folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}
    log = (folder / f"log-{len(list(folder.glob('log-*')))}.txt").open("wb")
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, stdout=log, stderr=log)


def ended(process: subprocess.Popen[bytes], folder: Path) -> int:
    try:
        return process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(logs(folder)) from None


def logs(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in folder.glob("log-*"))


def lines(run: Path) -> list[dict[str, float]]:
    path = run / "logs" / "metrics.jsonl"
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def losses(run: Path) -> dict[tuple[str, float], float]:
    return {(key, one["step"]): one[key] for one in lines(run) for key in ("loss", "eval_loss") if key in one}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The folder, and what is running in it."""
    folder = tmp_path_factory.mktemp("work")
    for name in {case["model"] for case in CASES.values()}:
        base_model(name, folder / name, torch.bfloat16, **SIZES, **({"head_dim": HEADS[name]} if name in HEADS else {}))
    words = [
        f"{first} {second} {n}" for first in ("sea", "sun", "tree") for second in ("salt", "rain") for n in range(60)
    ]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, text in enumerate(words):
            answer = f"what {text} does, " * (1 + number % 9)
            file.write(json.dumps({"prompt": f"what is {text}? ", "completion": answer}) + "\n")
    (folder / "laras.yaml").write_text(
        "model_name_or_path: llama\ndataset: rows.jsonl\nnum_train_epochs: 4\nlearning_rate: 0.0005\n"
        "effective_batch_size: 16\nper_device_train_batch_size: 4\npacking: true\ngradient_checkpointing: true\n"
        "load_in_4bit: false\nmax_length: 128\nlogging_steps: 1\neval_steps: 20\nsave_steps: 5\n"
        "early_stopping_patience: null\nreport_to: []\n",
        encoding="utf-8",
    )
    steps = str(Path(__file__).parents[1] / "unsloth_steps.py")
    train = ("-m", "laras", "train", "laras.yaml")
    running = {
        "steps unsloth": started(steps, "unsloth", str(folder), folder=folder),
        "steps plain": started(steps, "transformers", str(folder), folder=folder),
        "run unsloth": started(*train, "backend=unsloth", "run_name=unsloth", folder=folder),
        "run plain": started(*train, "run_name=plain", folder=folder),
    }
    yield folder, running
    for process in running.values():
        process.kill()


def test_a_killed_run_goes_on_and_ends_like_that_of_the_own_layers(processes):
    folder, running = processes
    run, plain = folder / "runs" / "unsloth", folder / "runs" / "plain"
    deadline = time.monotonic() + TIMEOUT_S
    while not any(one["step"] >= 6 for one in lines(run)):
        assert running["run unsloth"].poll() is None and time.monotonic() < deadline, logs(folder)
        time.sleep(0.05)
    running["run unsloth"].send_signal(signal.SIGKILL)
    running["run unsloth"].wait()
    assert RunResult.load(run).status == "running", logs(folder)
    running["resume"] = started("-m", "laras", "resume", "runs/unsloth", folder=folder)
    assert ended(running["resume"], folder) == 0, logs(folder)
    assert ended(running["run plain"], folder) == 0, logs(folder)
    plan, result = TrainPlan.load(run), RunResult.load(run)
    assert (plan.choices.backend, TrainPlan.load(plain).choices.backend) == ("unsloth", "transformers")
    assert "unsloth" in Environment.load(run).packages
    assert result.status == "finished" and "resume" in [event.kind for event in result.events]
    found, expected = losses(run), losses(plain)
    assert found.keys() == expected.keys()
    for (name, step), loss in expected.items():  # later steps of two bf16 paths drift apart
        if name == "eval_loss" or step <= 10:
            assert found[name, step] == pytest.approx(loss, rel=1e-2), (name, step)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_plain_padded_path(processes, case):
    folder, running = processes
    for name in ("steps unsloth", "steps plain"):
        assert ended(running[name], folder) == 0, logs(folder)
    found, expected = (json.loads((folder / f"{one}.json").read_text())[case] for one in ("unsloth", "transformers"))
    assert found == pytest.approx(expected, rel=1e-2)
    assert expected[-1] < expected[0]
    own, plain = (load_file(folder / f"{one}.safetensors")[case] for one in ("unsloth", "transformers"))
    assert torch.cosine_similarity(own, plain, dim=0) > 0.999
