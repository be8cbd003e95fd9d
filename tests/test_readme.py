import re

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("track", ["distillation"])
def test_the_results_in_the_readme_are_those_in_metrics(track: str):
    shown = re.search(rf"<!-- metrics/{track}.md -->\n(.*?)<!-- end -->", README, re.DOTALL).group(1)
    assert shown.strip() == (ROOT / "metrics" / f"{track}.md").read_text().strip()


def test_every_make_target_that_the_readme_names_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", README))
    assert {"demo", "test", "ui"} <= named <= targets
