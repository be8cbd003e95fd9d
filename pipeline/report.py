"""Stage report: turn a track's results and costs into a table, figures and a report, as Markdown and as one HTML page."""

import os
from pathlib import Path

from pipeline.core.cli import run
from pipeline.core.files import atomic_folder, main_checkout, read_json, write_atomic
from pipeline.data.npy import read_npy
from pipeline.evaluation.comparisons import read_evaluation
from pipeline.params import TRACKS
from pipeline.reporting.figures import draw_figures, png
from pipeline.reporting.gallery import confidently_wrong, plot_gallery
from pipeline.reporting.report import data_uri, render, sentence
from pipeline.reporting.tables import results_table

METRICS = Path("metrics")


def main(track: str) -> None:
    evaluation = read_evaluation(track, lambda path: Path(path).read_bytes())
    costs = read_json(METRICS / f"{track}_costs.json")
    exported = read_json(METRICS / f"{track}_export.json")
    figures = draw_figures(evaluation, costs, exported)
    with atomic_folder(METRICS / "figures" / track) as folder:
        for name, picture in figures.items():
            (folder / name).write_bytes(picture)
    images = read_npy(Path("data") / track / "test" / "images.npy")
    gallery = plot_gallery(confidently_wrong(evaluation), images, evaluation.detail["dataset"]["classes"])
    write_atomic(METRICS / "gallery" / f"{track}.png", png(gallery))  # cached, not committed: it shows the data
    plan = TRACKS[track]
    table = results_table(evaluation, plan.original_dataset)
    content = (plan.question, evaluation, costs, exported)
    files = {name: f"figures/{track}/{name}" for name in figures}
    write_atomic(METRICS / f"{track}.md", table)
    write_atomic(METRICS / f"{plan.report}.md", render("markdown", *content, files))
    page = METRICS / f"{plan.report}.html"
    inlined = {name: data_uri(picture) for name, picture in figures.items()}
    write_atomic(page, render("html", *content, inlined))
    sentences = [sentence(name, comparison) for name, comparison in evaluation.comparisons.items()]
    failed = [name for name, entry in evaluation.detail["models"].items() if entry["at_chance"]]
    warning = [f"Warning: not shown to be better than always naming the commonest class: {', '.join(failed)}"] if failed else []
    temporary = f"dvc get . {page} --rev {os.environ.get('DVC_EXP_NAME')} -o report.html"
    place = f"The report: {page if Path.cwd() == main_checkout() else temporary}"
    print("\n".join(["", table, plan.question, *sentences, *warning, "", place]))


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
