from pipeline.data.prepared import TrainingData
from pipeline.reporting.tables import results_table

FIGURES = {
    "accuracy": 0.98765,
    "auc": 0.99991,
    "f1_weighted": 0.9871,
    "final_train_loss": 0.01234,
    "parameters": 300426,
}


def test_the_table_puts_mean_and_deviation_beside_the_references_figures(data: TrainingData):
    metrics = {"teacher": FIGURES | {"accuracy_sd": 0.0012}, "student_alone": FIGURES}
    table = results_table("distillation", metrics, data.dataset, 3)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert rows[0][:4] == ["model", "parameters", "accuracy (%)", "reference (mnist)"]
    assert rows[2][:4] == ["teacher", "300,426", "98.77 ± 0.12", "98.81"]
    assert rows[3][:4] == ["student_alone", "300,426", "98.77", "98.64"]
    assert rows[2][-2:] == ["0.0123", "0.0123"]
    assert "400 / 100 / 0 training / validation / test images, 3 seeds" in table


def test_a_reference_on_other_data_is_called_no_comparison(data: TrainingData):
    same = data.dataset.model_copy(update={"name": "mnist"})
    assert "no comparison" in results_table("distillation", {"teacher": FIGURES}, data.dataset, 1)
    assert "no comparison" not in results_table("distillation", {"teacher": FIGURES}, same, 1)
