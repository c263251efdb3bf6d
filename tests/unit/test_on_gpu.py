"""The one call on a GPU: nothing outlives its time, everything found comes back in one file, a second call goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from laras.planning.catalogue import CATALOGUE


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import on_gpu

    monkeypatch.setattr(on_gpu, "_GRACE_S", 0.5)
    monkeypatch.setattr(on_gpu, "_LEAST_S", 0)
    monkeypatch.setattr(on_gpu, "_PACK_EVERY_S", 0.2)
    return on_gpu


def python(name: str, text: str, most_s: float = 20, **keys: Any) -> Any:
    import on_gpu

    return on_gpu.Part(name, most_s, ("-c", text, "PART", "LEFT"), **keys)


def found_in(out: Path) -> dict[str, str]:
    with tarfile.open(out / "on_gpu.tar.gz") as archive:
        files = [one for one in archive if one.isfile()]
        return {one.name.removeprefix("./"): archive.extractfile(one).read().decode() for one in files}  # type: ignore[union-attr]


def test_checks_run_side_by_side_and_measurements_after_them_one_at_a_time(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = "import sys, time; from pathlib import Path; began = time.time(); time.sleep(1)\n"
    times += "Path(sys.argv[1], 'times.txt').write_text(f'{began} {time.time()}')"
    monkeypatch.setattr(on_gpu, "CHECKS", tuple(python(name, times) for name in ("one", "other")))
    monkeypatch.setattr(on_gpu, "MEASUREMENTS", tuple(python(name, times) for name in ("first", "second")))
    names = ["one", "other", "first", "second"]
    on_gpu.run_all(names, 1, tmp_path / "work", tmp_path, time.monotonic() + 60)
    found = found_in(tmp_path)
    one, other, first, second = ([float(at) for at in found[f"{name}/times.txt"].split()] for name in names)
    assert one[0] < other[1] and other[0] < one[1]
    assert max(one[1], other[1]) < first[0] and first[1] < second[0]
    assert {f"{name}/ended_well" for name in names} <= found.keys()


def test_a_part_that_takes_too_long_ends_with_all_that_it_started_and_what_it_found_comes_back(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endless = "import subprocess, sys, time; from pathlib import Path\n"
    endless += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    endless += "Path(sys.argv[1], 'child.txt').write_text(str(child.pid)); print('found'); time.sleep(600)"
    monkeypatch.setattr(on_gpu, "CHECKS", (python("endless", endless, most_s=1.5),))
    monkeypatch.setattr(on_gpu, "MEASUREMENTS", ())
    on_gpu.run_all(["endless"], 1, tmp_path / "work", tmp_path, time.monotonic() + 60)
    found = found_in(tmp_path)
    assert found["endless/log.txt"] == "found\n"
    assert "endless/ended_well" not in found
    status = Path(f"/proc/{found['endless/child.txt']}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_second_call_runs_what_did_not_end_well_and_knows_its_card_and_its_seconds(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tells = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[2])"
    parts = (python("good", tells), python("bad", f"{tells}; sys.exit(1)", cards=(1,)))
    monkeypatch.setattr(on_gpu, "CHECKS", ())
    monkeypatch.setattr(on_gpu, "MEASUREMENTS", parts)
    for _ in range(2):
        on_gpu.run_all(["good", "bad"], 2, tmp_path / "work", tmp_path, time.monotonic() + 60)
    found = found_in(tmp_path)
    assert found["good/log.txt"] == "0 20\n"
    assert found["bad/log.txt"] == "1 20\n" * 2


def test_packages_that_change_other_libraries_are_there_for_one_part_alone(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "changes_everything.py").touch()
    monkeypatch.setenv("SOME_SITE", str(tmp_path / "site"))
    imports = "import laras; from importlib.util import find_spec; print(find_spec('changes_everything') is not None)"
    parts = (
        python("with", imports, site="SOME_SITE"), python("without", imports), python("no site", imports, site="NONE"),
        python("no package", imports, package="no_such_package"),
    )  # fmt: skip
    monkeypatch.setattr(on_gpu, "CHECKS", parts)
    monkeypatch.setattr(on_gpu, "MEASUREMENTS", ())
    names = [part.name for part in parts]
    on_gpu.run_all(names, 1, tmp_path / "work", tmp_path, time.monotonic() + 60)
    found = found_in(tmp_path)
    assert (found["with/log.txt"], found["without/log.txt"]) == ("True\n", "False\n")
    assert {name.partition("/")[0] for name in found} == {"with", "without"}


@pytest.mark.usefixtures("on_gpu")
def test_what_is_measured_on_two_cards_is_never_in_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import memory
    import step_time

    assert len({memory.results_of(gpu) for gpu in CATALOGUE}) == len(CATALOGUE)
    monkeypatch.setattr("pynvml.nvmlInit", lambda: None)
    monkeypatch.setattr("pynvml.nvmlDeviceGetHandleByIndex", lambda index: index)
    for driver_says, name in (("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200")):
        monkeypatch.setattr("pynvml.nvmlDeviceGetName", lambda handle, said=driver_says: said)
        assert memory.card().name == name
    figures = memory.RESULTS / "throughput.jsonl"
    assert list(step_time._of_throughput("H100", figures)) and not list(step_time._of_throughput("L4", figures))
    row = next(row for row in step_time.load(step_time.WORK) if row.is_device_bound())
    slower, faster = (step_time.replace(row, gpu=gpu).predicted_s() for gpu in ("H100", "H200"))
    assert faster < slower


def test_steps_of_variants_that_were_not_kept_have_no_part_in_the_fit(on_gpu: Any, tmp_path: Path) -> None:
    import json

    import step_time

    fact = {"step_ms": 300.0, "fused": True, "gpu": "NVIDIA H200"}
    direct = {"document_attention": False, "direct_launch": True}
    cases = {
        "qlora_full_8k": direct | {"direct_launch": False},
        "qlora_full_8k@direct_launch=1": direct,
        "qlora_full_8k@document_attention=1,direct_launch=1": direct | {"document_attention": True},
        "qlora_full_16k@qkv_again=0": {},
    }
    with (tmp_path / "throughput.jsonl").open("w") as file:
        for name, variant in cases.items():
            print(json.dumps({**fact, "name": name, "variant": variant}), file=file)
    directly, otherwise = step_time._of_throughput("H200", tmp_path / "throughput.jsonl")
    assert directly["key"].endswith("|qlora_full_8k@direct_launch=1")
    assert otherwise["key"].endswith("@qkv_again=0") and not otherwise["chosen"].qkv_again


def test_steps_on_free_cores_count_before_those_on_any_and_either_tells_what_the_device_took(
    on_gpu: Any, tmp_path: Path
) -> None:
    import json

    import memory
    import step_time

    free, anywhere, busy = (case.key for case in memory.cases()[:3])
    device = {"device_s": 0.1, "accumulation": 1}
    rows = [
        {"key": free, "steps_s": [0.4, 0.3, 0.5], **device},
        {"key": free, "free_s": [0.2, 0.21, 0.22], "busy_s": [0.4], **device, "device_s": 0.15},
        {"key": anywhere, "steps_s": [0.4, 0.3, 0.5], **device},
        {"key": busy, "free_s": [0.2], "busy_s": [0.4, 0.5], **device},
    ]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {row["key"].partition("|")[2]: row for row in step_time._of_steps(tmp_path / "steps.jsonl")}
    assert set(found) == {free, anywhere}
    assert (found[free]["measured_s"], found[free]["is_on_free_core"], found[free]["device_s"]) == (0.21, True, 0.15)
    assert (found[anywhere]["measured_s"], found[anywhere]["is_on_free_core"]) == (0.3, False)
    assert (found[anywhere]["device_s"], found[free]["any_core_s"]) == (0.1, 0.4)


def test_no_benchmark_has_the_name_of_a_package_that_a_library_looks_for() -> None:
    """transformers imports `kernels` where there is one; a script's own folder comes first."""
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    words = ("-c", "import transformers.modeling_utils")
    subprocess.run([sys.executable, *words], env={**os.environ, "PYTHONPATH": str(benchmarks)}, check=True)


def test_every_part_names_files_that_exist(on_gpu: Any) -> None:
    words = [word for part in (*on_gpu.CHECKS, *on_gpu.MEASUREMENTS) for word in part.command]
    paths = [
        Path(place) for word in words if (place := word.removeprefix("--ignore=")).startswith(str(on_gpu.HERE.parent))
    ]
    assert len(paths) >= 8 and all(path.exists() for path in paths)
