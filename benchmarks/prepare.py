"""Data preparation in rows/s: Laras beside the preparation of TRL's SFTTrainer, on the same rows in one run.

    python benchmarks/prepare.py              # 4,000 rows, two rounds, about a minute
    python benchmarks/prepare.py --rows 100000 --rounds 1

Laras reads, validates, renders, masks, tokenises, finds near duplicates, divides and caches; SFTTrainer, as a user
would set it up, renders and tokenises rows that are loaded already. The rounds alternate, so that other work on the
machine weighs on both; the figure to compare is the ratio. Laras tokenises on all cores, SFTTrainer on one; the CPU
times, of all threads, say what is left of the ratio when no core is idle.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

TOKENS_PER_ROW = 300
RESULT = Path(__file__).parent / "results" / "prepare.json"


def write_rows(path: Path, rows: int, tokenizer: object, seed: int = 0) -> float:
    """Two-turn conversations made of lines of the standard library; returns their mean length in tokens."""
    lines = []
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = module.read_text(encoding="utf-8", errors="replace")
        lines += [line for line in text.splitlines() if 20 < len(line) < 100]
    draw = random.Random(seed)

    def passage(count: int) -> str:
        return "\n".join(draw.choices(lines, k=count))

    def conversation(count: int) -> list[dict[str, str]]:
        quarter = count / 4
        sizes = [max(1, round(draw.gauss(quarter, quarter / 6))) for _ in range(4)]
        roles = ("user", "assistant", "user", "assistant")
        return [{"role": role, "content": passage(size)} for role, size in zip(roles, sizes, strict=True)]

    def tokens(messages: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])

    per_line = statistics.fmean(tokens(conversation(24)) for _ in range(50)) / 24
    count = TOKENS_PER_ROW / per_line
    sample = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            messages = conversation(count)
            if number < 500:
                sample.append(tokens(messages))
            file.write(json.dumps({"messages": messages}) + "\n")
    return statistics.fmean(sample)


Seconds = tuple[float, float]  # elapsed, and CPU time of all threads


def _clock() -> Seconds:
    return time.perf_counter(), time.process_time()


def _since(start: Seconds) -> Seconds:
    now = _clock()
    return now[0] - start[0], now[1] - start[1]


def time_laras(path: Path, tokenizer: object) -> Seconds:
    from laras.config_file import load_config
    from laras.data.prepare import prepare_dataset
    from laras.progress import Observer

    config = load_config(None, {"dataset": str(path)})
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # nothing prepared before is found
        start = _clock()
        prepared = prepare_dataset(config, tokenizer, 2048, Observer())
        elapsed = _since(start)
    assert prepared.profile.kept_rows == prepared.profile.rows
    return elapsed


def time_sft_trainer(path: Path, tokenizer: object) -> Seconds:
    """Seconds of the constructor, less those with eight rows: loading the rows and building the model are left out."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(shape)

    def construct(table: object) -> Seconds:
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(output_dir=folder, report_to=[], max_length=2048, use_cpu=True)
            start = _clock()
            SFTTrainer(model=model, args=arguments, train_dataset=table, processing_class=tokenizer)
            return _since(start)

    with tempfile.TemporaryDirectory() as cache:
        table = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        fixed = construct(table.select(range(8)))
        whole = construct(table)
        return whole[0] - fixed[0], whole[1] - fixed[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    from laras.models.builtin import resolve_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer("builtin:smollm2-135m"))
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        mean_tokens = write_rows(path, arguments.rows, tokenizer)
        small = Path(folder) / "small.jsonl"
        write_rows(small, 64, tokenizer)
        for warm_up in (time_laras, time_sft_trainer):  # imports are no preparation
            warm_up(small, tokenizer)
        for _ in range(arguments.rounds):
            laras_s, laras_cpu_s = time_laras(path, tokenizer)
            trl_s, trl_cpu_s = time_sft_trainer(path, tokenizer)
            rounds.append(
                {
                    "laras_s": laras_s,
                    "laras_cpu_s": laras_cpu_s,
                    "sft_trainer_s": trl_s,
                    "sft_trainer_cpu_s": trl_cpu_s,
                    "ratio": trl_s / laras_s,
                    "cpu_ratio": trl_cpu_s / laras_cpu_s,
                }
            )
            print(f"round {len(rounds)}: {trl_s / laras_s:.2f}x", file=sys.stderr)
    result = {
        "rows": arguments.rows,
        "mean_tokens": mean_tokens,
        "rounds": rounds,
        "laras_rows_per_s": arguments.rows / statistics.median(r["laras_s"] for r in rounds),
        "sft_trainer_rows_per_s": arguments.rows / statistics.median(r["sft_trainer_s"] for r in rounds),
        "ratio": statistics.median(r["ratio"] for r in rounds),
        "cpu_ratio": statistics.median(r["cpu_ratio"] for r in rounds),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("transformers", "trl", "datasets", "tokenizers", "rensa")},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{arguments.rows:,} conversations of {mean_tokens:.0f} tokens on {result['cores']} cores")
    print(f"{'':<28}{'rows/s':>10}")
    print(f"{'SFTTrainer (render, tokenise)':<28}{result['sft_trainer_rows_per_s']:>9,.0f}")
    print(f"{'Laras (the whole stage)':<28}{result['laras_rows_per_s']:>10,.0f}")
    print(f"{'ratio':<28}{result['ratio']:>10.2f}")
    print(f"{'ratio of CPU time':<28}{result['cpu_ratio']:>10.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
