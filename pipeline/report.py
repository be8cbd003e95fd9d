"""Stage report: put a track's results and costs into one report, as Markdown and as an HTML page that needs no other file."""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, run
from pipeline.evaluation.report import QUESTIONS, Results, plot_size, to_html, write_report
from pipeline.files import write_whole

METRICS = Path("metrics")
NAMES = {"baselines": "baselines_report", "distillation": "report"}  # the project's question has the plain name


def main(track: str) -> None:
    results = Results(
        metrics=read(f"{track}.json"),
        comparisons=read(f"{track}_comparisons.json"),
        by_class=read(f"{track}_by_class.json"),
        run=read(f"{track}_run.json"),
        costs=read(f"{track}_costs.json"),
        exported=read("export.json") if track == "distillation" else {},
    )
    name = NAMES[track]
    plot_size(results).savefig(METRICS / f"{name}_size.png", dpi=100)
    text = write_report(track, results, f"{name}_size.png")
    write_whole(METRICS / f"{name}.md", text)
    write_whole(METRICS / f"{name}.html", to_html(text, METRICS, QUESTIONS[track]))
    print(text.split("\n## ")[0])


def read(name: str) -> dict[str, Any]:
    """The content of a file in metrics/. Raises UserError if it is missing or no JSON."""
    try:
        return json.loads((METRICS / name).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"metrics/{name}: cannot be read: {error}: run dvc repro") from error


if __name__ == "__main__":
    run(main, track=tuple(QUESTIONS))
