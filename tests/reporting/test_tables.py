from collections.abc import Callable

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipeline.evaluation.comparisons import Evaluation
from pipeline.reporting.tables import escape, markdown_table, results_table


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


def test_the_table_puts_mean_and_deviation_beside_the_original_projects_figures(evaluation: Evaluation):
    figures = {"accuracy": 0.98765, "auc": 0.99991, "f1_weighted": 0.9871, "final_train_loss": 0.01234, "parameters": 300426}
    metrics = {"teacher": figures | {"accuracy_sd": 0.0012}, "student_alone": figures}
    table = results_table(evaluation._replace(metrics=metrics), "mnist")
    headings, _, teacher, alone = cells(table)
    assert headings[:4] == ["model", "parameters", "accuracy (%)", "original (mnist)"]
    assert teacher[:4] == ["teacher", "300,426", "98.77 ± 0.12", "98.81"]
    assert alone[:4] == ["student_alone", "300,426", "98.77", "98.64"]
    assert teacher[-2:] == ["0.0123", "0.0123"]
    assert "distillation: pets, 1 / 2 / 2,000 training / validation / test images, 3 seeds" in table


def test_figures_of_other_data_are_called_no_comparison(evaluation: Evaluation, evaluation_of: Callable[..., Evaluation]):
    assert "Original course project: one seed, on mnist, which is not pets" in results_table(evaluation, "mnist")
    assert "Original course project: one seed, on mnist.\n" in results_table(evaluation_of(name="mnist"), "mnist")


@given(st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126) | st.sampled_from("é\n\t"), max_size=40))
@example("<img src=/etc/passwd onerror=alert(1)>")
@example("a_b_ _c_ **d** `e` ~~f~~ [g](h) ![i](j) &amp; \\* $x$")
@example("http://example.com www.example.com | cell\n\n# heading")
def test_any_text_is_shown_as_it_is(text: str):
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = " ".join(text.split())
    paragraph = markdown.parse(f"x {escape(text)} x")
    assert [token.type for token in paragraph] == ["paragraph_open", "inline", "paragraph_close"]
    table = markdown.parse(markdown_table(["heading"], [[f"x {text} x"]]))
    for inline in (paragraph[1], [token for token in table if token.type == "inline"][1]):
        assert {token.type for token in inline.children} <= {"text", "text_special"}
        assert " ".join("".join(token.content for token in inline.children).split()) == f"x {shown} x".replace("  ", " ")
