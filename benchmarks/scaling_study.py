"""Time a study of 32 small trainings, one after another and on Ray with two workers, one thread each.

    python -m benchmarks.scaling_study

It prints what `measure` returns as JSON. Three runs, each in a copy of this checkout: one by one, on Ray, and on Ray with a
worker killed during a training.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults.checkout import SMALL, Checkout, copy_checkout
from faults.kills import kill_a_worker

WORKERS = 2
STUDY = """
target: evaluate@distillation
fixed: {seeds: [0, 1, 2, 3]}
grids:
  - {title: weights, x: kd.alpha, vary: {kd.alpha: [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]}}
"""
TRAININGS = 4 * (1 + 1 + 6)  # per seed: the teacher, the student alone, and one distilled student per weight


def measure(folder: Path) -> dict[str, float]:
    """Seconds of the whole command and, as `tasks_seconds_*`, from the first task's start to the last one's end; what follows."""
    calm, tasks = {}, {}
    for way, options in {"one_by_one": ["--one-by-one"], "on_ray": ["--workers", str(WORKERS)]}.items():
        calm[way], done = _run(_checkout(folder / way), options)
        tasks[way] = max(task["ended"] for task in done) - min(task["started"] for task in done)
    seconds_killed, done = _run(_checkout(folder / "killed"), ["--workers", str(WORKERS)], killed=True)
    return {
        "trainings": TRAININGS,
        "workers": WORKERS,
        **{f"seconds_{way}": seconds for way, seconds in calm.items()},
        "speedup": calm["one_by_one"] / calm["on_ray"],
        **{f"tasks_seconds_{way}": seconds for way, seconds in tasks.items()},
        "tasks_speedup": tasks["one_by_one"] / tasks["on_ray"],
        "trainings_per_second_one_by_one": TRAININGS / calm["one_by_one"],
        "trainings_per_second_on_ray": TRAININGS / calm["on_ray"],
        "seconds_on_ray_worker_killed": seconds_killed,
        "tasks_done_twice_worker_killed": sum(task["again"] for task in done),
    }


def _checkout(folder: Path) -> Checkout:
    checkout = copy_checkout(folder, **SMALL)
    (folder / "studies" / "scaling.yaml").write_text(STUDY)
    checkout.environment.pop("RAY_ADDRESS", None)
    # Ray's workers give way to other processes (nice 15), one process in the foreground does not: here neither does.
    checkout.environment |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    return checkout


def _run(checkout: Checkout, options: list[str], killed: bool = False) -> tuple[float, list[dict]]:
    """Run the study; its seconds and what each of its tasks notes. Raises CalledProcessError or ValueError if it is not whole."""
    start = time.perf_counter()
    process = checkout.start(sys.executable, "-m", "studies.study", "run", "scaling", *options)
    if killed:
        kill_a_worker(checkout.folder, process.pid)
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, output)
    done = [json.loads(path.read_text()) for path in checkout.folder.glob(".studies/*/done")]
    trainings = sum(task["seed"] is not None for task in done)
    finished = sum("/seed" in one.info.run_name and one.info.status == "FINISHED" for one in checkout.mlflow_runs())
    if not trainings == finished == TRAININGS:
        raise ValueError(f"{trainings} trainings, {finished} finished runs, not {TRAININGS}: {output}")
    return seconds, done


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder)), indent=2))
