"""`make faults`: every fault, into the real pipeline; one table, printed and written to faults/results.md.

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

from faults.checkout import ROOT
from faults.cost import cost
from faults.full_disk import full_disk
from faults.hostile_input import hostile_input
from faults.kills import kills
from faults.outages import outages
from faults.outcome import Outcome
from faults.queue import queued
from pipeline.core.files import write_json, write_atomic
from pipeline.core.provenance import code_is_committed, commit, machine

RESULTS = ROOT / "faults" / "results.json"
PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Outcome]]] = {
    "inputs": lambda folder, asked: hostile_input(asked.inputs),
    "disk": lambda folder, asked: [full_disk(folder)],
    "queue": lambda folder, asked: [queued(folder)],
    "outages": lambda folder, asked: outages(folder, asked.outages),
    "kills": lambda folder, asked: kills(folder, asked.kills),
    "cost": lambda folder, asked: [cost(folder, asked.dataset)],
}


def main() -> None:
    """Run the parts, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--outages", type=int, default=20)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--dataset", default="mnist", help="for the cost of an undisturbed run")
    parser.add_argument("--only", choices=list(PARTS))
    asked = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [asked.only] if asked.only else PARTS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = PARTS[name](Path(folder) / name, asked)
        print(table(outcomes), flush=True)
        kept[name] = {
            "minutes": (time.monotonic() - start) / 60,
            "code": code(),
            "outcomes": outcomes,
            "machine": machine(),
        }
        write_json(RESULTS, kept)
    found = {
        name: kept[name] | {"outcomes": [Outcome(*row) for row in kept[name]["outcomes"]]}
        for name in PARTS
        if name in kept
    }
    write_atomic(RESULTS.with_suffix(".md"), page(found))
    bad = [
        outcome.fault for part in found.values() for outcome in part["outcomes"] if outcome.survived < outcome.injected
    ]
    raise SystemExit(f"error: not survived: {', '.join(bad)}" if bad else 0)


def code() -> str:
    """Which code it is that the faults are put into."""
    return commit()[:12] + ("" if code_is_committed() else " with uncommitted changes")


def in_short(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes of each kind of fault, what is before the colon in its name, summed up."""
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.fault.partition(":")[0], []).append(outcome)
    return [
        Outcome(
            kind,
            *(sum(column) for column in zip(*(one[1:5] for one in found), strict=True)),
            found[0].told if len(found) == 1 else "",
        )
        for kind, found in kinds.items()
    ]


def table(outcomes: list[Outcome]) -> str:
    """Outcomes as a Markdown table."""
    return tabulate(outcomes, headers=["fault", "injected", "survived", "lost", "wrong", ""], tablefmt="github")


def page(parts: dict[str, dict[str, Any]]) -> str:
    """The outcomes in short and in detail, and what they were measured on."""
    outcomes = [outcome for part in parts.values() for outcome in part["outcomes"]]
    runs = [[name, f"{part['minutes']:.1f}", part["code"], *part["machine"].values()] for name, part in parts.items()]
    missing = [name for name in PARTS if name not in parts]
    where = list(dict.fromkeys(name for part in parts.values() for name in part["machine"]))
    return f"""# Faults

Written by `make faults`, which takes {sum(part["minutes"] for part in parts.values()):.0f} minutes here.

{table(in_short(outcomes))}

{f"Not run to their full counts yet: {', '.join(missing)}." if missing else "Every part has been run."}

Survived means: nothing missing and nothing other than without the fault. What exactly, each part says at its top:
faults/kills.py, outages.py, hostile_input.py, full_disk.py, queue.py and cost.py. In detail:

{table(outcomes)}

The parts, run one after the other:

{tabulate(runs, headers=["part", "minutes", "commit", *where], tablefmt="github", disable_numparse=True)}
"""


if __name__ == "__main__":
    main()
