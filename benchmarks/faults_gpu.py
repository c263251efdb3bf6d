"""Runs on a GPU in deterministic mode, killed at random instants: they must end with the bytes of one that was not.

    python benchmarks/faults.py --gpu                 # two minutes of a GPU; the package has to be installed
    python benchmarks/faults.py --gpu --device cpu    # the same logic without one

Each session is a process of its own, as a process that has used CUDA cannot be forked. It loads the libraries while
sessions before it still run, and waits, so that the time on the device goes to training; with enough cores the
scenarios run side by side. A kill comes at a random instant after training has begun, saving and evaluating included.
The runs are those of the product: the model is built as a plan says, with the fused layers and kernels where they
serve, and with a rehearsal. What is known is written after every kill and every run; a kill counts once its run has
ended.

padded       layers of transformers, float32, dropout
packed       fused layers, bf16 on a GPU, packed documents, checkpointed layers
qlora_8bit   4-bit base, states of the optimizer in 8 bits and paged (where bitsandbytes is installed)
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SCENARIOS: dict[str, dict[str, Any]] = {
    "padded": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lora_dropout": 0.1, "fused_layers": False,
    },
    "packed": {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "packing": True, "precision": "bf16",
        "loss_kind": "chunked", "gradient_checkpointing": True, "checkpoint_kind": "selective",
        "optim": "adamw_torch_fused",
    },
    "qlora_8bit": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "load_in_4bit": True, "precision": "bf16",
        "optim": "paged_adamw_8bit", "lora_r": 32,
    },
}  # fmt: skip
TRAIN_ROWS, VALIDATION_ROWS, MAX_LENGTH, VOCABULARY = 96, 16, 256, 320
STEPS, SAVE_STEPS, EVAL_STEPS = 24, 4, 8
_MAX_SESSIONS = 60  # of one run
_LOAD_LIMIT_S = 180.0


class Session:
    """A process that loads the libraries, waits for `begin`, and trains."""

    def __init__(self, device: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("faults.py")), "--gpu-session", "--device", device]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def begin(self, run_dir: Path, scenario: str) -> None:
        """Lets it train; returns when the first step begins."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"run_dir": str(run_dir), "scenario": scenario}) + "\n")
        self._process.stdin.flush()
        self._told("training")

    def device_name(self) -> str:
        """What it trains on; called after `begin`."""
        return self._told("device")

    def end(self, after_s: float | None) -> int:
        """The exit status; a session that still runs after so many seconds is killed."""
        try:
            return self._process.wait(after_s)
        except subprocess.TimeoutExpired:
            self._process.kill()  # SIGKILL
            return self._process.wait()

    def _told(self, what: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            name, _, value = line.rstrip("\n").partition(" ")
            if name == what:
                return value
        raise RuntimeError(f"a session ended with {self._process.wait(_LOAD_LIMIT_S)} before it told its {what}")


class Sessions:
    """Sessions, of which some are always loading ahead."""

    def __init__(self, device: str, ahead: int) -> None:
        self._device, self._lock = device, threading.Lock()
        self._waiting = [Session(device) for _ in range(ahead)]

    def take(self) -> Session:
        """The one that has been loading for the longest."""
        with self._lock:
            self._waiting.append(Session(self._device))
            return self._waiting.pop(0)

    def close(self) -> None:
        """Ends those that nobody took."""
        for session in self._waiting:
            session.end(0.0)


class Sweep:
    """Kills runs of every scenario, and keeps what is known.

    Args:
        folder: For the runs; holds the base model.
        wanted: Kills of runs that have ended, over all scenarios.
        seed: Of the instants.
        limit_s: Seconds after which nothing is killed any more, so that what runs can end.
        sessions: Where they come from.
        keep: Told the report whenever it changes.
    """

    def __init__(
        self, folder: Path, wanted: int, seed: int, limit_s: float, sessions: Sessions,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:  # fmt: skip
        self.report: dict[str, Any] = {}
        self._folder, self._wanted, self._seed, self._sessions, self._keep = folder, wanted, seed, sessions, keep
        self._started, self._limit_s, self._lock = time.monotonic(), limit_s, threading.Lock()

    def run(self, name: str) -> None:
        """One scenario, until there are enough kills or no time is left; one run at least."""
        expected, duration_s = self._reference(name)
        random_, number = random.Random(f"{self._seed} {name}"), 0
        while number == 0 or not self._is_over():
            number += 1
            run_dir = self._folder / f"{name}-{number}"
            kills, saving = self._kill_until_done(run_dir, name, duration_s, random_)
            different = differences(whole_outcome(run_dir), expected)
            with self._lock:
                entry = self.report[name]
                entry["runs"] += 1
                entry["kills"] += kills
                entry["while saving"] += saving
                entry["different"] += bool(different)
                entry["kills of the run that has not ended"] = 0
                print(f"gpu: {name}: {entry} {different}", flush=True)
                self._tell()

    def _reference(self, name: str) -> tuple[dict[str, Any], float]:
        run_dir = self._folder / f"{name}-whole"
        session = self._sessions.take()
        session.begin(run_dir, name)
        began = time.monotonic()
        device = session.device_name()
        if (status := session.end(None)) != 0:
            raise RuntimeError(f"{name}: the run that nobody disturbs ended with {status}")
        duration_s = time.monotonic() - began
        with self._lock:
            self.report["device"] = device
            self.report[name] = {
                "runs": 0, "kills": 0, "while saving": 0, "different": 0, "run_s": round(duration_s, 1),
                "kills of the run that has not ended": 0,
            }  # fmt: skip
        return whole_outcome(run_dir), duration_s

    def _is_over(self) -> bool:
        with self._lock:
            kills = sum(entry["kills"] for entry in self.report.values() if isinstance(entry, dict))
        return kills >= self._wanted or time.monotonic() - self._started > self._limit_s

    def _kill_until_done(self, run_dir: Path, name: str, duration_s: float, random_: random.Random) -> tuple[int, int]:
        """Kills and resumes one run until it ends; returns the kills, and how many of them hit a saving."""
        saving = 0
        for kills in range(_MAX_SESSIONS):
            session = self._sessions.take()
            session.begin(run_dir, name)
            # Short, for many kills of a run; later sessions get longer, so that every run comes to its end.
            limit_s = duration_s * random_.uniform(0.05, 0.5) * (1 + kills / 6)
            is_late = time.monotonic() - self._started > self._limit_s
            status = session.end(None if is_late and kills else limit_s)
            if status == 0:
                return kills, saving
            if status != -9:
                raise RuntimeError(f"{run_dir.name}: a session ended with {status}")
            saving += any(path.name.endswith((".partial", ".old", ".removed")) for path in run_dir.rglob(".*"))
            with self._lock:
                self.report[name]["kills of the run that has not ended"] = kills + 1
                self._tell()
        raise RuntimeError(f"{run_dir.name}: not done after {_MAX_SESSIONS} sessions")

    def _tell(self) -> None:
        self._keep({**self.report, "elapsed_s": round(time.monotonic() - self._started)})


def sweep(
    folder: Path, wanted: int, seed: int, device: str, limit_s: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """At least `wanted` kills over the scenarios, if the time allows."""
    names = [name for name in SCENARIOS if name != "qlora_8bit" or find_spec("bitsandbytes")]
    cores = len(os.sched_getaffinity(0))
    lanes = len(names) if cores >= 2 * len(names) else 1
    sessions = Sessions(device, 2 * lanes if cores >= 4 * lanes else 1)
    one = Sweep(folder, wanted, seed, limit_s, sessions, keep)
    try:
        make_base(folder / "base")
        with ThreadPoolExecutor(lanes) as pool:
            for done in [pool.submit(one.run, name) for name in names]:
                done.result()
    finally:
        sessions.close()
    return one.report


def whole_outcome(run_dir: Path) -> dict[str, Any]:
    """As for the runs on a CPU, less the lines that only say how much memory a rehearsal took."""
    from tiny_training import outcome

    found = outcome(run_dir)
    found["metrics"] = [line for line in found["metrics"] if line.keys() - {"step", "epoch"}]
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    names = [name for name in expected if name != "files" and found.get(name) != expected[name]]
    return names + [
        f"files/{name}" for name, content in expected["files"].items() if found["files"].get(name) != content
    ]


def make_base(folder: Path) -> None:
    """A small random Llama with a tokenizer."""
    from tiny_models import base_model

    base_model(
        "llama", folder, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2 * MAX_LENGTH,
    )  # fmt: skip


def run_session(device: str) -> None:
    """Loads, waits for one line of standard input, trains, and tells where it is."""
    with suppress(ImportError):
        import bitsandbytes  # noqa: F401 - so that it is there when it is wanted
    import torch

    import tiny_training as tiny
    from laras.config import RunConfig
    from laras.models.build import build_model
    from laras.models.loader import load_tokenizer
    from laras.progress import Observer
    from laras.records import MemoryEstimate
    from laras.rundir import RunDir, run_status
    from laras.training.resume import choose_checkpoint
    from laras.training.run import run_training

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as `laras train` does
    if device == "cuda":
        torch.zeros(1, device="cuda")  # the context takes a second or two
    request = json.loads(sys.stdin.readline())
    run_dir, changed = Path(request["run_dir"]), dict(SCENARIOS[request["scenario"]])
    if device == "cpu":
        changed["precision"] = "fp32"

    class Told(Observer):
        def training_started(self, plan: Any, first_step: int) -> None:
            print("training", flush=True)
            print("device", torch.cuda.get_device_name() if device == "cuda" else "cpu", flush=True)

    base = run_dir.parent / "base"
    config = RunConfig.model_validate(
        {
            "model_name_or_path": str(base), "num_train_epochs": 100, "max_steps": STEPS, "report_to": [],
            "full_determinism": True, "early_stopping_patience": None, "effective_batch_size": 8,
        }
    )  # fmt: skip
    plan = tiny.plan(1, 1, source=str(base), max_length=MAX_LENGTH, **{
        "target_modules": ("all-linear",), "learning_rate": 1e-3, "lora_r": 8, "save_steps": SAVE_STEPS,
        "eval_steps": EVAL_STEPS, **changed,
    })  # fmt: skip
    plan = plan.model_copy(
        update={
            "hardware": plan.hardware.model_copy(update={"kind": device}),
            "memory": MemoryEstimate.model_validate({**plan.memory.model_dump(), "components": {"optimizer": 1}}),
        }
    )
    checkpoint = None
    if run_status(RunDir(run_dir)) != "finished" and (run_dir / "checkpoints").exists():
        checkpoint = choose_checkpoint(run_dir, None, Observer())
    model = build_model(config, plan.choices, "cuda:0" if device == "cuda" else "cpu", Observer())
    run_training(
        config, plan, model, load_tokenizer(str(base)), train_rows=random_rows(TRAIN_ROWS, 1),
        validation_rows=random_rows(VALIDATION_ROWS, 2), run_dir=run_dir, observer=Told(), resume_from=checkpoint,
        rehearse=True,
    )  # fmt: skip


def random_rows(count: int, seed: int) -> Any:
    """Rows of 20 to 250 random tokens, the first quarter of which carries no loss."""
    from datasets import Dataset

    draw = random.Random(seed)
    ids = [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(20, MAX_LENGTH - 6))] for _ in range(count)]
    labels = [[-100] * (len(row) // 4) + row[len(row) // 4 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})
