import pytest

from pipeline.core.errors import UserError
from pipeline.params import load_params
from studies.tasks import plan
from tests.conftest import ROOT


def test_a_study_has_no_teacher_from_outside():
    params = load_params(ROOT / "params.yaml")
    teacher = params.teacher.model_copy(update={"logits": "a.npz"})
    with pytest.raises(UserError, match="a study trains its teachers"):
        plan(params.model_copy(update={"teacher": teacher}))
