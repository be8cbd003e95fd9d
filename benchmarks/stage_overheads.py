"""What each stage takes beyond its trainings, and `dvc repro` with nothing to do: `python -m benchmarks.stage_overheads`.

Minutes, on a quiet machine, in a copy of the checkout: the mnist5k images, one seed, one epoch. Printed as Markdown.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from tabulate import tabulate

from benchmarks.side_by_side import environment
from pipeline.core.provenance import commit, machine

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats, rows = parser.parse_args().repeats, []
    with tempfile.TemporaryDirectory() as name:
        checkout = copy_checkout(Path(name) / "checkout")
        run(checkout, "dvc", "repro")
        for stage in (None, *stages()):  # outputs of measure_cost differ, and DVC would run what follows them
            command = (sys.executable, "-m", *f"pipeline.{stage}".split()) if stage else ("dvc", "repro")
            beyond = [run(checkout, *command) for _ in range(repeats)]
            rows.append([stage or "dvc repro, nothing to do", f"{statistics.median(beyond):.1f}", f"{max(beyond):.1f}"])
            print(*rows[-1], file=sys.stderr, flush=True)
    print(f"Stages beyond training, {repeats} runs of each, commit {commit()[:12]}, {machine()}\n")
    print(tabulate(rows, ["stage", "seconds, median", "largest"], tablefmt="github"))


def stages() -> list[str]:
    """Module and argument of every stage of dvc.yaml, in its order, which is the graph's."""
    commands = []
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values():
        command = stage.get("do", stage)["cmd"].removeprefix("python -m pipeline.")
        commands += [re.sub(r"\$\{\w+\}", key, command) for key in stage.get("foreach", [""])]
    return commands


def copy_checkout(folder: Path) -> Path:
    """A copy of the project as it lies here, without results, as a git repository: mnist5k, one seed, one epoch."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in listed.splitlines():
        if (ROOT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((folder / "params.yaml").read_text()) | {"seeds": [0]}
    params["baselines"] |= {"dataset": "mnist5k", "pretrained": False, "epochs": 1}
    params["distillation"] |= {"dataset": "mnist5k", "epochs": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def run(checkout: Path, *command: str) -> float:
    """Seconds that a command takes there, but for those that it says it trained."""
    variables = environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "RETRAIN": "1"}
    with tempfile.TemporaryFile("w+") as output:  # not a pipe, which processes that outlive the stage would keep open
        start = time.perf_counter()
        subprocess.run(command, cwd=checkout, env=variables, check=True, stdout=output)
        spent = time.perf_counter() - start
        output.seek(0)
        return spent - sum(float(trained) for trained in re.findall(r"; ([\d.]+) s on", output.read()))


if __name__ == "__main__":
    main()
