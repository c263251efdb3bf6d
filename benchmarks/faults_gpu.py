"""Runs on a GPU in deterministic mode, killed at random instants: they must end with the bytes of one that was not.

    python benchmarks/faults.py --gpu                 # about five minutes of a GPU; the package has to be installed
    python benchmarks/faults.py --gpu --device cpu    # the same logic without one

Each session is a process of its own, as a process that has used CUDA cannot be forked. It loads the libraries while the
session before it still runs, and waits; so that the time on the device goes to training. A kill comes at a random
instant after training has begun, saving and evaluating included. The runs are those of the product: the model is
built as a plan says, with the fused layers and kernels where they serve, and with a rehearsal.

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
import time
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
    """Sessions, of which one is always loading ahead."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._next = Session(device)

    def take(self) -> Session:
        """One that is loading or loaded."""
        taken, self._next = self._next, Session(self._device)
        return taken

    def close(self) -> None:
        """Ends the one that nobody took."""
        self._next.end(0.0)


def sweep(folder: Path, wanted: int, seed: int, device: str) -> dict[str, Any]:
    """At least `wanted` kills over the scenarios, in turn."""
    random_, started = random.Random(seed), time.monotonic()
    names = [name for name in SCENARIOS if name != "qlora_8bit" or find_spec("bitsandbytes")]
    report: dict[str, Any] = {}
    sessions = Sessions(device)
    try:
        make_base(folder / "base")
        references = {}
        for name in names:
            session = sessions.take()
            session.begin(folder / f"{name}-whole", name)
            began = time.monotonic()
            report["device"] = session.device_name()
            if (status := session.end(None)) != 0:
                raise RuntimeError(f"{name}: the run that nobody disturbs ended with {status}")
            references[name] = (whole_outcome(folder / f"{name}-whole"), time.monotonic() - began)
            report[name] = {
                "runs": 0,
                "kills": 0,
                "while saving": 0,
                "different": 0,
                "run_s": round(references[name][1], 1),
            }
        number = 0
        while sum(report[name]["kills"] for name in names) < wanted:
            name = names[number % len(names)]
            number += 1
            expected, duration_s = references[name]
            kill_until_done(folder / f"{name}-{number}", name, duration_s, sessions, random_, report[name])
            different = differences(whole_outcome(folder / f"{name}-{number}"), expected)
            report[name]["runs"] += 1
            report[name]["different"] += bool(different)
            print(f"gpu: {name}: {report[name]} {different}", flush=True)
    finally:
        sessions.close()
    report["elapsed_s"] = round(time.monotonic() - started)
    return report


def kill_until_done(
    run_dir: Path, name: str, duration_s: float, sessions: Sessions, random_: random.Random, counts: dict[str, Any]
) -> None:
    """Kills and resumes one run until it ends."""
    for attempt in range(_MAX_SESSIONS):
        session = sessions.take()
        session.begin(run_dir, name)
        # The first session of a run is killed for certain; later ones get longer, so that every run comes to its end.
        limit_s = duration_s * (random_.uniform(0.1, 0.9) if attempt == 0 else random_.uniform(0, 1 + attempt / 4))
        status = session.end(limit_s)
        if status == 0:
            return
        if status != -9:
            raise RuntimeError(f"{run_dir.name}: a session ended with {status}")
        counts["kills"] += 1
        counts["while saving"] += any(
            path.name.endswith((".partial", ".old", ".removed")) for path in run_dir.rglob(".*")
        )
    raise RuntimeError(f"{run_dir.name}: not done after {_MAX_SESSIONS} sessions")


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
