"""Mutational fuzzing of everything that reads what others wrote; the only exception that may come out is a LarasError.

    nice python benchmarks/fuzz.py                    # 120,000 inputs, some minutes on one core
    python benchmarks/fuzz.py --inputs 2000 --seed 7

Valid files are damaged by random bytes, cuts, doublings, splices and words that parsers dislike, from a fixed seed,
and read: data files (and their rows brought to a format), configurations, and of a run directory the records, the
ledger and rows of the sealed set, the manifest and state of a checkpoint, and the list of runs; chat templates are
compiled and rendered. An input whose reading takes
more than `SLOW_S` of CPU time is counted too. Exits with 1 when anything came out that should not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from laras.config import RunConfig
from laras.config_file import config_to_yaml, load_config
from laras.data.formats import detect_layout, normalize_row
from laras.data.read import file_rows
from laras.data.render import build_renderer
from laras.data.sealed import read_openings, seal_test, unseal
from laras.data.store import token_table, tokens_digest
from laras.errors import LarasError
from laras.progress import Observer
from laras.record_base import Record
from laras.records import (
    DatasetProfile,
    EvalResult,
    ParentRun,
    PlanChange,
    PlanRevision,
    RunResult,
    SplitManifest,
    TrainPlan,
)
from laras.rundir import RunDir, list_runs
from laras.training.checkpoints import choose_checkpoint, damaged_checkpoints
from laras.training.state import read_state

SLOW_S = 2.0
RESULT = Path(__file__).parent / "results" / "fuzz.json"
_ROWS = 200  # read of one input
_EXAMPLES = 5  # kept of a target's failures
_RECORDS: tuple[type[Record], ...] = (
    DatasetProfile, SplitManifest, TrainPlan, RunResult, EvalResult, ParentRun, PlanRevision,
)  # fmt: skip
_PARENT = ParentRun(run="one", model="step-4", step=4, eval_loss=1.5, weights_sha256="0" * 64)
_REVISION = PlanRevision(
    train_split_level=1, eval_split_level=0, micro_batch="2 rows", per_device_eval_batch_size=4,
    changes=(PlanChange(step=3, reason="x", train_split_level=1, eval_split_level=0),),
)  # fmt: skip
_WORDS = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\n", b"\r", b'"', b"'", b"\\", b"{", b"}",
    b"[", b"]", b",", b":", b": ", b"- ", b"&a ", b"*a", b"<<: ", b"!!python/name:os.system ", b"!!int ", b"!!bool ",
    b"!!binary ", b"!!timestamp ", b"? ", b"|\n", b"%YAML 1.1\n", b"---\n", b"null", b"true", b"NaN", b"-Infinity",
    b"1e999", b"-0", b"9" * 30, b"9" * 4400, b"0x" + b"f" * 4000, b"[" * 400, b"{a: " * 120, b'{"a":' * 1500,
    b"../../x", b"/etc/passwd", b"**/", b"PAR1", b"PK\x03\x04", b"\x80\x04", b"a" * 5000, b"2020-99-99", b"{{ 7 * 7 }}",
)  # fmt: skip


@dataclass
class Target:
    """Something that reads a file.

    Attributes:
        seeds: Valid contents.
        read: Reads a damaged content, in a folder of its own.
        share: Its part of all inputs, relative to the others.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[Path, bytes], Any]
    share: int
    inputs: int = 0
    refused: int = 0
    slow: int = 0
    uncaught: list[str] = field(default_factory=list)


def mutated(seeds: list[bytes], draw: random.Random) -> bytes:
    """One of the seeds with one to six damages."""
    content = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        start = draw.randrange(len(content) + 1)
        stop = min(len(content), start + draw.choice((1, 2, 8, 40, 400)))
        kind = draw.randrange(7)
        if kind == 0 and content:
            content[min(start, len(content) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[start:stop]
        elif kind == 2:
            content[start:start] = content[start:stop] * draw.choice((1, 2, 50))
        elif kind == 3:
            content[start:stop] = draw.randbytes(stop - start)
        elif kind == 4:
            other = draw.choice(seeds)
            cut = draw.randrange(len(other) + 1)
            content[start:stop] = other[cut : cut + stop - start]
        elif kind == 5:
            content[start : draw.choice((start, stop))] = draw.choice(_WORDS)
        else:
            del content[draw.choice((start, len(content))) :]
    return bytes(content)


def fuzz(inputs: int, seed: int) -> list[Target]:
    """Gives every target its share of the inputs."""
    shared_memory = Path("/dev/shm")  # no disk is to be worn out
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as name:
        targets = _targets()
        total = sum(target.share for target in targets)
        for target in targets:
            draw = random.Random(f"{seed}/{target.name}")
            for _ in range(-(-inputs * target.share // total)):
                _try(target, Path(name), mutated(target.seeds, draw))
    return targets


def _try(target: Target, folder: Path, content: bytes) -> None:
    target.inputs += 1
    begin = time.process_time()
    try:
        target.read(folder, content)
    except LarasError as error:
        target.refused += 1
        if not (error.hint and str(error)):
            _note(target, "a LarasError without message or hint", content)
    except Exception:  # noqa: BLE001 - what this is about
        _note(target, " ".join(traceback.format_exc(limit=-2).split()), content)
    if time.process_time() - begin > SLOW_S:
        target.slow += 1


def _note(target: Target, what: str, content: bytes) -> None:
    if len(target.uncaught) < _EXAMPLES:
        what = f"{what[-400:]} <- {content[:300]!r}"
    target.uncaught.append(what)


def _targets() -> list[Target]:
    rows = _rows()
    lines = [b"".join(json.dumps(row).encode() + b"\n" for row in some) for some in rows]
    lists = [json.dumps(some).encode() for some in rows] + [json.dumps({"data": rows[0]}).encode()]
    tables = [b'prompt,completion\n"a ""b""\nc",d\ne,f\n', b"text;id\nhello;1\nworld;2\n", b"text\tn\na\t1\n"]
    configs = [config_to_yaml(RunConfig()).encode(), b"seed: 1\nlr: 1e-4\n", _CONFIG]
    return [
        Target("jsonl", lines, _reader(".jsonl"), 25),
        Target("json", lists, _reader(".json"), 15),
        Target("csv", tables, _reader(".csv"), 15),
        Target("parquet", [_parquet(some) for some in [*rows, _ODD_ROWS]], _reader(".parquet"), 15),
        Target("gzip", [gzip.compress(one) for one in lines], _reader(".jsonl.gz"), 10),
        Target("zstd", [_zstd(one) for one in lines], _reader(".jsonl.zst"), 10),
        Target("config", configs, _read_config, 15),
        Target("override", [b"split.test=0.2", b"columns={prompt: q}", b"report_to=[]"], _read_override, 5),
        Target("records", _record_files(), _read_records, 15),
        Target("ledger", [_LEDGER, _LEDGER * 3], _read_ledger, 5),
        Target("checkpoint", [_MANIFEST, _STATE], _read_checkpoint, 10),
        Target("sealed", [_sealed_file()], _read_sealed, 5),
        Target("template", [text.encode() for text in _TEMPLATES], _template_reader(), 10),
    ]


_CONFIG = b"""model_name_or_path: Qwen/Qwen2.5-Coder-1.5B-Instruct
dataset: {train: [data/a.jsonl, "data/*.csv"], validation: v.jsonl, test: null}
columns: {prompt: question, completion: answer}
output_dir: runs
run_name: first
learning_rate: 2.0e-4
num_train_epochs: 3
lora_r: auto
split: {train: auto, validation: 0.1, test: 0.1, stratify_by: kind}
report_to: [tensorboard]
seed: 42
"""
_LEDGER = b'{"opened_at":"2026-01-01T00:00:00+00:00","purpose":"x","max_samples":null,"laras_version":"1.0.0"}\n'
_MANIFEST = json.dumps({"a.txt": "0" * 64, "deep/b.txt": "1" * 64}, indent=2).encode()
_STATE = json.dumps(
    {
        "counters": {
            "stopping": {"patience": 5, "min_delta": 0.001, "reference": 1.5, "without_improvement": 1},
            "losses": {},
            "tokens": 4,
            "best_loss": 1.5,
            "events": [{"step": 1, "kind": "resume", "detail": "x"}],
        },
        "identity": {"seed": 42},
    }
).encode()


_TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% set ns = namespace(n=0) %}{% macro turn(m, last) %}<|im_start|>{{ m.role ~ '\n' }}{% generation %}"
    "{{ m.content|trim + '<|im_end|>' }}{% endgeneration %}{% endmacro %}{% for m in messages if m.content %}"
    "{% set ns.n = ns.n + 1 %}{{ turn(m, loop.last) }}{% else %}{{ raise_exception('none') }}{% endfor %}",
    "{% for m in messages[::-1] %}{% if loop.index0 % 2 == 0 and m['role'] in ['user', 'assistant'] %}"
    "{{ {'r': m.role, 'c': m.content}|tojson }}{{ '%s' % m.role }}{{ m.content.split('</think>')[-1] }}{% continue %}"
    "{% endif %}{{ range(3)|list|join(',') }}{{ strftime_now('%Y') }}{{ 'a' * 3 }}{{ 2 ** 3 }}<|im_end|>{% endfor %}",
)


_ODD_ROWS: list[dict[str, Any]] = [
    {
        "text": "a",
        "when": datetime(2020, 1, 1, tzinfo=UTC),
        "raw": b"\xff\x00",
        "price": Decimal("1.50"),
        "deep": {"a": [{"b": [1]}]},
    }
]


def _rows() -> list[list[dict[str, Any]]]:
    turns = [{"role": "user", "content": "hi é"}, {"role": "assistant", "content": "ho"}]
    shares = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    return [
        [{"messages": turns}, {"messages": turns * 2}],
        [{"conversations": shares}] * 3,
        [{"instruction": "add", "input": "1 2", "output": "3"}] * 3,
        [{"prompt": "a", "completion": "b", "score": 1.5, "id": 7}] * 3,
        [{"text": "some words"}, {"text": "more"}],
    ]


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, compression=random.Random(len(rows)).choice(("none", "snappy")))
    return file.getvalue()


def _zstd(content: bytes) -> bytes:
    import pyarrow as pa

    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def _reader(suffix: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        path = folder / f"data{suffix}"
        path.write_bytes(content)
        rows = list(islice(file_rows(path), _ROWS))
        objects = [row.value for row in rows if isinstance(row.value, dict)]
        layout = detect_layout([str(key) for row in objects for key in row])
        for row in objects:
            example = normalize_row(row, layout)
            json.dumps(example, ensure_ascii=False).encode()

    return read


def _read_config(folder: Path, content: bytes) -> None:
    path = folder / "laras.yaml"
    path.write_bytes(content)
    config = load_config(path)
    path.write_text(config_to_yaml(config), encoding="utf-8")
    if load_config(path) != config.model_copy():
        raise AssertionError("the resolved configuration is another one")


def _read_override(folder: Path, content: bytes) -> None:
    load_config(None, [content.decode("utf-8", "surrogateescape")])


def _record_files() -> list[bytes]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from example_run import write_example_run

    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        write_example_run(run)
        for record in (_PARENT, _REVISION):
            record.save(run)
        return [(run / "records" / f"{record.name}.json").read_bytes() for record in _RECORDS]


def _read_records(folder: Path, content: bytes) -> None:
    run = folder / "runs" / "one"
    (run / "records").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
    refusals = []
    for record in _RECORDS:
        (run / "records" / f"{record.name}.json").write_bytes(content)
    for record in _RECORDS:
        try:
            record.load(run).digest()
        except LarasError as error:
            refusals.append(error)
    list_runs(folder / "runs")
    if len(refusals) == len(_RECORDS):
        raise refusals[0]


def _read_ledger(folder: Path, content: bytes) -> None:
    path = folder / "splits" / "sealed" / "openings.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    read_openings(folder)


def _read_checkpoint(folder: Path, content: bytes) -> None:
    """As a resume does: look for the newest good one, read its state, and the configuration of the run."""
    checkpoints = folder / "checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)
    step = checkpoints / "step-10"
    step.mkdir(parents=True)
    (step / "a.txt").write_bytes(b"a")
    (step / "manifest.json").write_bytes(content)
    (folder / "config.yaml").write_bytes(content)
    choose_checkpoint(checkpoints, None, Observer())
    damaged_checkpoints(checkpoints)
    step.mkdir(exist_ok=True)
    (step / "training.json").write_bytes(content)
    refusals = []
    for read in (lambda: read_state(step), RunDir(folder).load_config):
        try:
            read()
        except LarasError as error:
            refusals.append(error)
    if len(refusals) == 2:
        raise refusals[0]


def _sealed_file() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        seal_test(_sealed_rows(), Path(name))
        return (Path(name) / "splits" / "sealed" / "test.sealed").read_bytes()


def _sealed_rows() -> Any:
    return token_table([[1, 2, 3]] * 20, [[-100, 2, 3]] * 20, range(20))


def _read_sealed(folder: Path, content: bytes) -> None:
    path = folder / "splits" / "sealed" / "test.sealed"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if not unseal(folder, tokens_digest(_sealed_rows())).equals(_sealed_rows()):
        raise AssertionError("other rows were opened")


def _template_reader() -> Callable[[Path, bytes], None]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny_models import tokenizer

    words = tokenizer()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]

    def read(folder: Path, content: bytes) -> None:
        renderer = build_renderer(words, "messages", True, content.decode("utf-8", "surrogateescape"))
        renderer.encode([{"messages": turns * count} for count in (1, 3)])

    return read


def _report(targets: list[Target], seed: int, elapsed_s: float) -> dict[str, Any]:
    named = {
        target.name: {
            "inputs": target.inputs,
            "refused": target.refused,
            "uncaught": len(target.uncaught),
            "slow": target.slow,
            "examples": target.uncaught[:_EXAMPLES],
        }
        for target in targets
    }
    return {
        "command": "python benchmarks/fuzz.py",
        "seed": seed,
        "python": platform.python_version(),
        "inputs": sum(target.inputs for target in targets),
        "refused": sum(target.refused for target in targets),
        "uncaught": sum(len(target.uncaught) for target in targets),
        "slow": sum(target.slow for target in targets),
        "elapsed_s": round(elapsed_s, 1),
        "targets": named,
    }


def main() -> None:
    """Fuzzes, prints the counts and keeps them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    wanted = parser.parse_args()
    begin = time.perf_counter()
    report = _report(fuzz(wanted.inputs, wanted.seed), wanted.seed, time.perf_counter() - begin)
    wanted.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    raise SystemExit(1 if report["uncaught"] or report["slow"] else 0)


if __name__ == "__main__":
    main()
