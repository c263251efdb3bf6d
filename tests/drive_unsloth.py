"""drive_unsloth.py ACTION ARGUMENT: a run through the Python API in a fresh process, as if there were a GPU.

train CONFIG    trains, and kills itself after step 3
broken CONFIG   trains two steps, the import tried in earnest
rebound CONFIG  trains with the own layers after Unsloth itself, not a stand-in, has replaced TRL's trainers as on a GPU
resume RUN      goes on, then asks for the score in the same process
"""

import json
import os
import signal
import sys

import laras
from laras.models import unsloth
from laras.planning import backend
from laras.progress import Observer

backend.machine_refusals = lambda capability: []
backend._method_refusals = lambda config: []  # a CPU computes in fp32


class Killer(Observer):
    def step_finished(self, report):
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


assert "torch" not in sys.modules
action, argument = sys.argv[1:]
if action == "broken":
    laras.train(argument, backend="unsloth", run_name="broken", max_steps=2)
    assert "unsloth" not in sys.modules
    raise SystemExit
if action == "rebound":
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"  # its modules for a GPU, without one, which leave trainers alone
    assert unsloth.import_first(with_trial=False) is None
    import trl
    from unsloth.models.rl import patch_trl_rl_trainers
    from unsloth.trainer import _patch_trl_trainer

    os.environ["UNSLOTH_ALLOW_CPU"] = "0"
    patch_trl_rl_trainers()
    _patch_trl_trainer()
    assert trl.SFTTrainer.__name__ == "UnslothSFTTrainer"
    laras.train(argument, backend="transformers", run_name="rebound")
    raise SystemExit
unsloth._failure_of_trial = lambda: None  # which looks for a GPU
if action == "train":
    laras.train(argument, observer=Killer(), backend="unsloth", run_name="unsloth")
else:
    laras.resume(argument)
    try:
        laras.test(argument)
    except laras.LarasError as error:
        print(json.dumps({"refused": error.message}))
