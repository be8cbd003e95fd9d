"""`make faults`: every fault, into the real pipeline; one table, printed and written to tests/faults/results.md.

About half an hour on 2 cores. `--kills`, `--outages` and `--inputs` say how many of each; `--only` repeats one part.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pipeline.core.files import write_atomic, write_json
from pipeline.core.provenance import code_is_committed, commit, machine
from tests.faults.checkout import Outcome
from tests.faults.dvc_queue import queued
from tests.faults.full_disk import full_disk
from tests.faults.hostile_input import hostile_input
from tests.faults.kills import kills
from tests.faults.outages import outages

RESULTS = Path(__file__).with_name("results.json")
PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Outcome]]] = {
    "inputs": lambda folder, arguments: hostile_input(arguments.inputs),
    "disk": lambda folder, arguments: [full_disk(folder)],
    "queue": lambda folder, arguments: [queued(folder)],
    "outages": lambda folder, arguments: outages(folder, arguments.outages),
    "kills": lambda folder, arguments: kills(folder, arguments.kills),
}


def main() -> None:
    """Run the parts, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--outages", type=int, default=20)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--only", choices=list(PARTS))
    arguments = parser.parse_args()
    parts = read_results()
    for name in [arguments.only] if arguments.only else PARTS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = PARTS[name](Path(folder) / name, arguments)
        print(table(outcomes), flush=True)
        code = commit()[:12] + ("" if code_is_committed() else " with uncommitted changes")
        parts[name] = {"minutes": (time.monotonic() - start) / 60, "code": code, "outcomes": outcomes, "machine": machine()}
        write_json(RESULTS, parts)
    write_atomic(RESULTS.with_suffix(".md"), page(parts))
    outcomes = [outcome for part in parts.values() for outcome in part["outcomes"]]
    bad = [outcome.fault for outcome in outcomes if outcome.survived < outcome.injected]
    raise SystemExit(f"error: not survived: {', '.join(bad)}" if bad else 0)


def read_results() -> dict[str, dict[str, Any]]:
    """The parts that have been run, in the order of PARTS."""
    parts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in parts.values():
        part["outcomes"] = [Outcome(*row) for row in part["outcomes"]]
    return {name: parts[name] for name in PARTS if name in parts}


def in_short(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes of each kind of fault, what is before the colon in its name, summed up."""
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.fault.partition(":")[0], []).append(outcome)
    return [
        Outcome(
            kind, *(sum(column) for column in zip(*(row[1:5] for row in rows), strict=True)), rows[0].details * (len(rows) == 1)
        )
        for kind, rows in kinds.items()
    ]


def table(outcomes: list[Outcome]) -> str:
    """Outcomes as a Markdown table."""
    return tabulate(outcomes, headers=["fault", "injected", "survived", "lost", "wrong", ""], tablefmt="github")


def page(parts: dict[str, dict[str, Any]]) -> str:
    """The outcomes in short and in detail, and what they were measured on."""
    outcomes = [outcome for part in parts.values() for outcome in part["outcomes"]]
    where = list(dict.fromkeys(name for part in parts.values() for name in part["machine"]))
    runs = [
        [name, f"{part['minutes']:.1f}", part["code"], *(part["machine"].get(key, "") for key in where)]
        for name, part in parts.items()
    ]
    missing = [name for name in PARTS if name not in parts]
    return f"""# Faults

Written by `make faults`, which takes {sum(part["minutes"] for part in parts.values()):.0f} minutes here.

{table(in_short(outcomes))}

{f"Not run to their full counts yet: {', '.join(missing)}." if missing else "Every part has been run."}

Survived means: nothing missing and nothing other than without the fault. What exactly, each part says at its top:
tests/faults/kills.py, outages.py, hostile_input.py, full_disk.py and dvc_queue.py. In detail:

{table(outcomes)}

The parts, run one after the other:

{tabulate(runs, headers=["part", "minutes", "commit", *where], tablefmt="github", disable_numparse=True)}
"""


if __name__ == "__main__":
    main()
