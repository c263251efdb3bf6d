"""The metrics file holds every step once, and is valid JSON whatever happens."""

import json

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from laras.progress import Observer
from laras.training.callbacks.metrics_log import MetricsLog


class Recorder(Observer):
    def __init__(self):
        self.warnings = []

    def warning(self, text):
        self.warnings.append(text)


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path / "trainer"), use_cpu=True, report_to=[])


def state_at(step, main=True):
    return TrainerState(global_step=step, epoch=step / 10, is_world_process_zero=main)


def run(log, args, first, steps):
    log.on_train_begin(args, state_at(first), TrainerControl())
    for step in steps:
        log.on_log(args, state_at(step), TrainerControl(), logs={"loss": 1.0 / step, "epoch": step / 10})


def lines(log):
    return [json.loads(text) for text in log.path.read_text().splitlines()]


def test_each_line_has_step_epoch_time_and_the_metrics(tmp_path, args):
    log = MetricsLog(tmp_path, Observer())
    run(log, args, 0, [10, 20])
    assert [list(line) for line in lines(log)] == [["step", "epoch", "time_s", "loss"]] * 2
    assert [(line["step"], line["epoch"], line["loss"]) for line in lines(log)] == [(10, 1.0, 0.1), (20, 2.0, 0.05)]
    assert 0 <= lines(log)[0]["time_s"] <= lines(log)[1]["time_s"]


def test_a_resume_cuts_the_lines_after_its_step_and_a_torn_one(tmp_path, args):
    run(MetricsLog(tmp_path, Observer()), args, 0, [10, 20, 30])
    path = tmp_path / "logs" / "metrics.jsonl"
    old = [{**json.loads(text), "time_s": 100.0} for text in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in old) + '{"step": 15, "lo')
    resumed = MetricsLog(tmp_path, Observer())
    run(resumed, args, 20, [30, 40])
    assert [line["step"] for line in lines(resumed)] == [10, 20, 30, 40]
    assert lines(resumed)[2]["time_s"] >= 100.0


def test_a_fresh_start_begins_an_empty_file(tmp_path, args):
    run(MetricsLog(tmp_path, Observer()), args, 0, [10])
    log = MetricsLog(tmp_path, Observer())
    run(log, args, 0, [5])
    assert [line["step"] for line in lines(log)] == [5]


def test_values_that_json_cannot_hold_become_null_or_plain(tmp_path, args):
    log = MetricsLog(tmp_path, Observer())
    log.on_train_begin(args, state_at(0), TrainerControl())
    logs = {"loss": float("nan"), "grad_norm": np.float32(0.5), "note": "x", "odd": {1}}
    log.on_log(args, state_at(1), TrainerControl(), logs=logs)
    (line,) = lines(log)
    assert (line["loss"], line["grad_norm"], line["note"], line["odd"]) == (None, 0.5, "x", "{1}")


def test_only_the_first_process_writes(tmp_path, args):
    log = MetricsLog(tmp_path, Observer())
    log.on_train_begin(args, state_at(0, main=False), TrainerControl())
    log.on_log(args, state_at(1, main=False), TrainerControl(), logs={"loss": 1.0})
    assert not log.path.exists()


def test_an_unwritable_file_is_announced_once_and_stops_nothing(tmp_path, args):
    (tmp_path / "logs").write_text("a file where the folder should be")
    observer = Recorder()
    run(MetricsLog(tmp_path, observer), args, 0, [1, 2, 3])
    assert len(observer.warnings) == 1 and "metrics.jsonl" in observer.warnings[0]
