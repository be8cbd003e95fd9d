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
from tests.faults.full_disk import full_disk
from tests.faults.kills import kills, queued
from tests.faults.malformed_input import malformed_input
from tests.faults.outages import outages

RESULTS = Path(__file__).with_name("results.json")
EXPLANATION = """Written by `make faults`: each kind of fault, each fault, and when and where the parts were run. Survived means:
nothing missing and nothing other than without the fault; what exactly, each part says at the top of its module."""
PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Outcome]]] = {
    "inputs": lambda folder, arguments: malformed_input(arguments.inputs),
    "disk": lambda folder, arguments: [full_disk(folder)],
    "queue": lambda folder, arguments: [queued(folder)],
    "outages": lambda folder, arguments: outages(folder, arguments.outages),
    "kills": lambda folder, arguments: kills(folder, arguments.kills),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 50), ("outages", 20), ("inputs", 10_000)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--only", choices=list(PARTS))
    arguments = parser.parse_args()
    parts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [arguments.only] if arguments.only else PARTS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = PARTS[name](Path(folder) / name, arguments)
        print(table(outcomes), flush=True)
        code = commit()[:12] + ("" if code_is_committed() else " with uncommitted changes")
        parts[name] = {"minutes": (time.monotonic() - start) / 60, "code": code, "outcomes": outcomes, "machine": machine()}
        write_json(RESULTS, parts)
    write_atomic(RESULTS.with_suffix(".md"), "\n\n".join(["# Faults", EXPLANATION, *tables(parts)]) + "\n")
    bad = [fault for part in parts.values() for fault, injected, survived, *_ in part["outcomes"] if survived < injected]
    raise SystemExit(f"error: not survived: {', '.join(bad)}" if bad else 0)


def table(outcomes: list[Outcome]) -> str:
    return tabulate(outcomes, headers=["fault", "injected", "survived", "lost", "wrong", ""], tablefmt="github")


def tables(parts: dict[str, dict[str, Any]]) -> list[str]:
    """The outcomes summed up by what is before the colon in a fault's name, each outcome, and what they were measured on."""
    parts = {name: parts[name] for name in PARTS if name in parts}
    outcomes = [Outcome(*row) for part in parts.values() for row in part["outcomes"]]
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.fault.partition(":")[0], []).append(outcome)
    sums = {kind: [sum(column) for column in zip(*(row[1:5] for row in rows), strict=True)] for kind, rows in kinds.items()}
    short = [Outcome(kind, *sums[kind], rows[0].details if len(rows) == 1 else "") for kind, rows in kinds.items()]
    where = list(dict.fromkeys(key for part in parts.values() for key in part["machine"]))
    runs = [[name, f"{part['minutes']:.1f}", part["code"], *map(part["machine"].get, where)] for name, part in parts.items()]
    headers = ["part", "minutes", "commit", *where]
    return [table(short), table(outcomes), tabulate(runs, headers=headers, tablefmt="github", disable_numparse=True)]


if __name__ == "__main__":
    main()
