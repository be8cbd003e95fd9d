"""What being ready for all this costs an undisturbed run: the time in saving progress and finding runs again, in its stages."""

import json
import os
import sys
import time
from pathlib import Path

from faults.checkout import copy_checkout
from faults.outcome import Outcome

STAGES = ("train_teacher", "distill_student", "train_student_alone")
MEASURED = """
import atexit, importlib, json, sys, time
from pipeline import checkpoints, errors, progress, tracking_store, unsent
spent = 0.0
def timed(owner, name):
    function = getattr(owner, name)
    def wrapper(*arguments, **named):
        global spent
        start = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent += time.perf_counter() - start
    setattr(owner, name, wrapper)
timed(progress.File, "save")
timed(progress.File, "load")
timed(tracking_store.Store, "_by_key")
timed(unsent.Kept, "send_left")
timed(unsent.Kept, "send")
stage = importlib.import_module(sys.argv.pop(1))
atexit.register(lambda: print(json.dumps({"spent": spent})))
sys.modules["__main__"].__doc__ = stage.__doc__
errors.run(stage.main)
"""


def cost(folder: Path, dataset: str) -> Outcome:
    """Default trainings of the distillation track, one seed, on `dataset`; the share of their wall time."""
    checkout = copy_checkout(folder, distillation__dataset=dataset, seeds=[0])
    if mirror := os.environ.get("DATA_MIRROR"):
        checkout.environment["DATA_MIRROR"] = str(Path(mirror).resolve())
    checkout.run(*checkout.stage("fetch_data distillation"))
    spent = total = 0.0
    for stage in STAGES:
        start = time.perf_counter()
        done = checkout.run(sys.executable, "-c", MEASURED, f"pipeline.{stage}", timeout=1200)
        total += time.perf_counter() - start
        spent += json.loads(done.stdout.splitlines()[-1])["spent"]
    share = spent / total
    told = f"{spent:.2f} of {total:.1f} s on {dataset}: {share:.1%}"
    return Outcome("no fault: readiness costs at most 5 %", 1, int(share <= 0.05), 0, 0, told)
