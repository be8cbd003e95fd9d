"""Stage report: put a track's results and costs into one report, as Markdown and as an HTML page that needs no other file."""

from pathlib import Path

from pipeline.core.cli import run
from pipeline.reporting.report import QUESTIONS, Results, plot_size, to_html, write_report
from pipeline.core.files import read_json, write_atomic

METRICS = Path("metrics")
NAMES = {"baselines": "baselines_report", "distillation": "report"}  # the project's question has the plain name


def main(track: str) -> None:
    results = Results(
        metrics=read_json(METRICS / f"{track}.json"),
        comparisons=read_json(METRICS / f"{track}_comparisons.json"),
        by_class=read_json(METRICS / f"{track}_by_class.json"),
        run=read_json(METRICS / f"{track}_run.json"),
        costs=read_json(METRICS / f"{track}_costs.json"),
        exported=read_json(METRICS / "export.json") if track == "distillation" else {},
    )
    name = NAMES[track]
    plot_size(results).savefig(METRICS / f"{name}_size.png", dpi=100)
    text = write_report(track, results, f"{name}_size.png")
    write_atomic(METRICS / f"{name}.md", text)
    write_atomic(METRICS / f"{name}.html", to_html(text, METRICS, QUESTIONS[track]))
    print(text.split("\n## ")[0])


if __name__ == "__main__":
    run(main, track=tuple(QUESTIONS))
