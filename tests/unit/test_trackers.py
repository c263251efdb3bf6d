"""No tracker can hurt a run: not by being absent, not by failing at the start, in the middle or at the end."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import laras.training.run as run_module
import laras.training.trackers as trackers_module
import tiny_training as tiny
from laras.config import RunConfig
from laras.training.tracker_clients import Described, TensorBoard
from laras.training.trackers import Trackers, build_trackers
from tiny_training import SCENARIOS, Scenario, outcome, train


class Broken:
    """A tracker that raises, or hangs, at one moment."""

    name = "broken"

    def __init__(self, moment: str, hang: bool = False) -> None:
        self.moment, self.hang, self.seen = moment, hang, 0

    def _fail(self, moment: str) -> None:
        if moment == self.moment:
            if self.hang:
                time.sleep(60)
            raise (SystemExit(3) if moment == "start" else ConnectionError("the service is gone\nwith a long story"))

    def start(self) -> str | None:
        self._fail("start")
        return None

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.seen += 1
        if self.seen > 2:
            self._fail("log")

    def finish(self) -> None:
        self._fail("finish")


def told(observer: tiny.Recorder) -> list[str]:
    """What was said about trackers; the machine's memory is not theirs."""
    return [text for text in observer.warnings if "memory is in use" not in text]


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("untracked")
    train(folder, SCENARIOS["padded"])
    return outcome(folder)


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers_module, "START_LIMIT_S", 1.0)
    monkeypatch.setattr(trackers_module, "END_LIMIT_S", 1.0)


@pytest.mark.parametrize("hang", [False, True], ids=["raises", "hangs"])
@pytest.mark.parametrize("moment", ["start", "log", "finish"])
def test_a_tracker_that_fails_at_any_moment_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_limits: None, untracked: Any, moment: str, hang: bool
) -> None:
    observer = tiny.Recorder()
    broken = Broken(moment, hang)
    monkeypatch.setattr(run_module, "build_trackers", lambda *_: Trackers([broken], observer))
    started = time.monotonic()
    train(tmp_path, SCENARIOS["padded"], observer=observer)
    assert time.monotonic() - started < 50  # it would hang for 60
    assert outcome(tmp_path) == untracked
    assert len(told(observer)) == 1, told(observer)
    assert told(observer)[0].startswith("broken: off (") and "\n" not in told(observer)[0]


def test_the_start_of_all_trackers_together_has_one_limit(short_limits: None) -> None:
    observer = tiny.Recorder()
    trackers = Trackers([Broken("start", hang=True), Broken("start", hang=True), Broken("never")], observer)
    assert trackers.start() < 1.5
    assert len(told(observer)) == 2 and all("did not start within 1 s" in text for text in told(observer))


@pytest.mark.parametrize("moment", ["start", "log", "finish"])
def test_a_tracker_that_hangs_costs_one_limit_and_no_more(short_limits: None, moment: str) -> None:
    trackers = Trackers([Broken(moment, hang=True)], tiny.Recorder())
    started = time.monotonic()
    trackers.start()
    for step in range(4):
        trackers.on_log(None, SimpleNamespace(global_step=step), None, {"loss": 1.0})  # type: ignore[arg-type]
    trackers.finish()
    assert time.monotonic() - started < 1.9  # of the limits of a second each; the real ones are of ten


def test_an_absent_tracker_is_announced_once_and_the_others_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers_module, "find_spec", lambda name: None if name == "trackio" else object())
    observer = tiny.Recorder()
    train(tmp_path, Scenario(8, 1, config={"report_to": ["trackio", "tensorboard"]}), observer=observer)
    assert told(observer) == [
        "trackio: off (not installed: pip install 'laras[trackio]'); metrics.jsonl has everything"
    ]
    assert list((tmp_path / "logs" / "tensorboard").iterdir())


def tensorboard_events(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "logs" / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_shows_every_finite_metric_once_resumes_included(tmp_path: Path) -> None:
    scenario = Scenario(8, 1, config={"report_to": ["tensorboard"]})
    train(tmp_path, scenario)
    # A clock that was ahead then: the name sorts behind that of any later session, as it may within one second.
    (written,) = (tmp_path / "logs" / "tensorboard").iterdir()
    written.rename(written.with_name("events.out.tfevents.4102444800.host.99999.9"))
    for _ in range(2):
        train(tmp_path, scenario, resume=3)
    events = tensorboard_events(tmp_path)
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("eval_loss")] == [3, 6]
    expected = {line["step"]: line["loss"] for line in tiny.metrics(tmp_path) if "loss" in line}
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(expected)


def test_many_sessions_within_a_second_are_read_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "logs" / "tensorboard"
    described = Described(RunConfig(), tiny.plan(4, 2))
    now = time.time()
    for pid, first_step in enumerate((0, 2, 1, 3, 0)):
        monkeypatch.setattr("os.getpid", lambda pid=pid: 20 - 3 * pid)  # names sort against the order of the sessions
        with monkeypatch.context() as clock:
            clock.setattr("time.time", lambda: now)
            tracker = TensorBoard(folder, described, first_step)
            tracker.start()
        for step in range(first_step + 1, 5):
            tracker.log({"loss": 10 * pid + step}, step)
        tracker.finish()
        if first_step == 3:
            seen = [event.value for event in tensorboard_events(tmp_path).Scalars("loss")]
            assert seen == [1, 22, 23, 34]
    assert [event.value for event in tensorboard_events(tmp_path).Scalars("loss")] == [41, 42, 43, 44]


def test_values_that_are_no_finite_numbers_are_left_to_the_metrics_file() -> None:
    class Seen(Broken):
        def log(self, metrics: dict[str, float], step: int) -> None:
            self.metrics = metrics

    seen = Seen("never")
    trackers = Trackers([seen], tiny.Recorder())
    trackers.start()
    logs = {"loss": float("nan"), "grad_norm": 1, "note": "x", "eval_loss": 2.5}
    trackers.on_log(None, tiny_state(), None, logs=logs)
    trackers.finish()
    assert seen.metrics == {"grad_norm": 1.0, "eval_loss": 2.5}


def tiny_state() -> Any:
    from transformers import TrainerState

    return TrainerState(global_step=1)


def test_ids_are_kept_for_a_resume(tmp_path: Path) -> None:
    first = trackers_module._run_id(tmp_path, "wandb")
    assert trackers_module._run_id(tmp_path, "wandb") == first != trackers_module._run_id(tmp_path, "trackio")
    (tmp_path / "logs" / "trackers.json").write_text("[broken")
    assert trackers_module._run_id(tmp_path, "wandb") != first


# ---------------------------------------------------------------- the real clients


class _Failing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(500)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(params=["logged out", "name unknown", "silent", "broken"])
def wandb_service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Ways in which the service is not there; without a key it is never asked."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if request.param != "logged out":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Failing)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = {
            "silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "broken": f"http://127.0.0.1:{server.server_address[1]}",
        }.get(request.param, "https://wandb.invalid")
        monkeypatch.setenv("WANDB_BASE_URL", address)
        yield request.param
        server.shutdown()


def test_wandb_that_cannot_be_reached_is_offline_within_ten_seconds(
    tmp_path: Path, wandb_service: str, untracked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    observer = tiny.Recorder()
    config = RunConfig(report_to=["wandb"])
    trackers = build_trackers(config, tiny.plan(4, 2), tmp_path / "probe", 0, observer)
    assert trackers.start() < 10
    trackers.finish()
    (warning,) = told(observer)
    assert warning.startswith("wandb: offline (") and "wandb sync" in warning
    if wandb_service == "logged out":
        scenario = SCENARIOS["padded"]
        tracked = Scenario(scenario.micro, scenario.accumulation, dropout=0.1, config={"report_to": ["wandb"]})
        observer = tiny.Recorder()
        train(tmp_path / "run", tracked, observer=observer)
        assert len(told(observer)) == 1 and "offline" in told(observer)[0]
        assert outcome(tmp_path / "run") == untracked
        (written,) = (tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
        assert json.loads((tmp_path / "run" / "logs" / "trackers.json").read_text())["wandb"] in written.name
        deadline = time.monotonic() + 20  # the client's own process writes it
        while b"grad_norm" not in written.read_bytes():
            assert time.monotonic() < deadline, "nothing was written"
            time.sleep(0.1)
    assert capsys.readouterr().out == ""


def test_trackio_takes_the_metrics_and_prints_nothing_to_standard_output(
    tmp_path: Path, untracked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trackio")
    observer = tiny.Recorder()
    scenario = SCENARIOS["padded"]
    tracked = Scenario(scenario.micro, scenario.accumulation, dropout=0.1, config={"report_to": ["trackio"]})
    train(tmp_path / "run", tracked, observer=observer)
    assert outcome(tmp_path / "run") == untracked
    assert told(observer) == []
    assert capsys.readouterr().out == ""
