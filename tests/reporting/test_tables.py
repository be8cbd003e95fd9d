import html
import re

from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.evaluation.comparisons import Evaluation
from pipeline.reporting.tables import escape, markdown_table, results_table


def test_the_table_has_means_and_deviations_and_the_original_projects_figures_on_its_data(evaluation: Evaluation):
    figures = {"accuracy": 0.98765, "auc": 0.99991, "f1_weighted": 0.9871, "parameters": 300426}
    metrics = {"teacher": figures | {"accuracy_sd": 0.0012}, "student_alone": figures}
    for data, columns in (("mnist", []), ("digits", ["original accuracy (%)"])):
        table = results_table(evaluation._replace(metrics=metrics), data)
        rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if line.startswith("|")]
        measured = ["model", "parameters", "accuracy (%)", "AUC", "weighted F1 (%)"]
        assert rows[0] == [*measured, *columns]
        assert rows[2][:5] == ["teacher", "300,426", "98.77 ± 0.12", "0.9999", "98.71"]
        assert rows[2][5:] == (["98.81"] if columns else [])
        assert rows[3][:3] == ["student_alone", "300,426", "98.77"]
        assert "distillation: digits, 400 / 100 / 0 training / validation / test images, 2 seeds" in table
        assert "± is the standard deviation" in table
        assert ("Original" in table) == bool(columns)
    models = {name: entry | {"parameters": {"distillation.epochs": 6}} for name, entry in evaluation.detail["models"].items()}
    assert "Original" not in results_table(evaluation._replace(detail=evaluation.detail | {"models": models}), "digits"), (
        "another recipe"
    )


@given(st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126) | st.sampled_from("é\n\t"), max_size=40))
@example("<img src=x> a_b_ _c_ **d** `e` ~~f~~ [g](h) &amp; \\* $x$ http://example.com WWW.example.com | cell\n\n# heading")
def test_any_text_is_shown_as_it_is(text: str):
    escaped = escape(text)
    assert html.unescape(escaped) == re.sub(r"\s+", " ", text)
    assert not set(re.sub(r"&#\d+;", "", escaped)) & set("\\`*[]<>|~#&$\n")
    assert not re.search("://|www[.]", escaped.lower())
    assert all(before.isalnum() and after.isalnum() for before, after in re.findall("(.?)_(?=(.?))", escaped))
    assert [line.count("|") for line in markdown_table(["heading"], [[text]]).splitlines()] == [2, 2, 2]
