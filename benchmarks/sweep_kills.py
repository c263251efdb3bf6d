"""Sweeps that are killed at random instants: how often they ended as one that nothing disturbed.

    python benchmarks/sweep_kills.py --sweeps 5

A sweep of six trials over a tiny model, pruned ones among them, is killed with SIGKILL at random instants, wherever it
is then, and started again until it ends. Trials, their values and states, what Optuna stored, the best and the final
trial, and the bytes of every trained adapter must be those of a sweep that was never killed.

Counts go to `benchmarks/results/sweep_kills.json`. Processes are forked from one that has its imports done, so that a
kill hits the sweep and not the start of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import alembic.command
import optuna.storages
import torch
from faults import forked

import laras
import laras.data.prepare
import laras.models.build
import laras.planning.planner
import laras.training.run
from laras import pipeline
from laras.sweep_record import SweepRecord, trial_dir
from laras.sweeping.study import Study
from tiny_models import base_model

torch.set_num_threads(1)
RESULTS = Path(__file__).parent / "results" / "sweep_kills.json"
TRIALS = 6
SEARCH = {"learning_rate": "1e-5..3e-2:log", "lora_r": [2, 4]}
LONGEST_LIFE_S = 2.0  # of the first process; later ones get longer, so that a slow machine comes to an end
MAX_LIVES = 200
WORDS = ("sea", "sun", "tree", "salt", "rain", "road", "bird", "snow", "lamp", "door", "fish", "wind")
FACTS = ("trials", "stored", "weights", "best", "final", "status")
PRELOADED = (alembic.command, optuna.storages)


def prepare() -> None:
    """A model, data and a configuration in the working folder."""
    base_model("llama", Path("model"))
    with Path("chats.jsonl").open("w", encoding="utf-8") as file:
        for number in range(60):
            first, second = WORDS[number % 12], WORDS[number // 12]
            question = {"role": "user", "content": f"what is {first} number {number} for a {second}"}
            answer = {"role": "assistant", "content": f"a {first} is what {second} does, {number} times over"}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    Path("laras.yaml").write_text(
        "model_name_or_path: model\ndataset: chats.jsonl\nmax_steps: 9\neffective_batch_size: 8\n"
        "per_device_train_batch_size: 8\nmax_length: 256\neval_steps: 3\nlora_r: 4\nreport_to: []\n",
        encoding="utf-8",
    )


def sweep(name: str) -> None:
    """One process' part of a sweep; the pages of single trials are left out, which takes nothing from what is shown."""
    pipeline._write_report = lambda *_: None  # type: ignore[assignment]
    laras.sweep("laras.yaml", SEARCH, trials=TRIALS, run_name=name)


def facts(folder: Path) -> list[Any]:
    """Everything that two sweeps must share to be the same one."""
    record = SweepRecord.load(folder)
    study = Study(folder / "study.sqlite3", record.space, record.seed)
    stored = [(one.number, one.state.name, one.params, one.value, one.intermediate_values) for one in study.trials()]
    study.close()
    weights = [
        (trial_dir(folder, trial.number) / "final" / "adapter_model.safetensors").read_bytes()
        for trial in record.trials
        if trial.status == "finished"
    ]
    trials = [trial.model_dump(exclude={"result_digest"}) for trial in record.trials]
    return [trials, stored, weights, record.best, record.final, record.status]


def killed_until_done(name: str, rng: random.Random) -> int:
    """Kills and starts again until the sweep ends by itself; returns the kills."""
    for kills in range(MAX_LIVES):
        child = forked(lambda: sweep(name))
        end_s = time.monotonic() + rng.uniform(0.05, LONGEST_LIFE_S * (1 + kills / 10))
        while time.monotonic() < end_s:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                if os.waitstatus_to_exitcode(status) != 0:
                    raise SystemExit(f"{name} ended with exit code {os.waitstatus_to_exitcode(status)}")
                return kills
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    raise SystemExit(f"{name} did not end within {MAX_LIVES} lives")


def main() -> None:
    """Counts and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    output = options.output.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        prepare()
        _, status = os.waitpid(forked(lambda: sweep("undisturbed")), 0)
        if status:
            raise SystemExit("the undisturbed sweep did not end")
        expected = facts(Path("runs/undisturbed"))
        kills = identical = 0
        for number in range(options.sweeps):
            found = killed_until_done(f"killed-{number}", random.Random(options.seed + number))
            result = facts(Path(f"runs/killed-{number}"))
            same = result == expected
            kills, identical = kills + found, identical + same
            print(f"sweep {number}: {found} kills, {'the same' if same else 'ANOTHER'} result", file=sys.stderr)
            for name, one, other in zip(FACTS, result, expected, strict=True):
                if one != other and name != "weights":
                    print(f"  {name}: {one}\n  undisturbed: {other}", file=sys.stderr)
        os.chdir("/")
    counts = {
        "command": f"python benchmarks/sweep_kills.py --sweeps {options.sweeps} --seed {options.seed}",
        "sweeps": options.sweeps,
        "trials_each": TRIALS,
        "statuses": [trial["status"] for trial in expected[0]],
        "kills": kills,
        "identical": identical,
    }
    output.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
