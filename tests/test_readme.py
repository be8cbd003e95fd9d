import re

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("track", ["distillation"])
def test_the_results_in_the_readme_are_those_in_metrics(track: str):
    shown = re.search(rf"<!-- metrics/{track}.md -->\n(.*?)<!-- end -->", README, re.DOTALL).group(1)
    assert shown.strip() == (ROOT / "metrics" / f"{track}.md").read_text().strip()


def test_the_speed_table_is_that_of_a_measured_device():
    shown = re.search(r"<!-- (benchmarks/results/[\w.-]+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    table = [line for line in (ROOT / shown.group(1)).read_text().splitlines() if line.startswith("|")]
    assert shown.group(2).strip().splitlines() == table


def test_the_faults_in_the_readme_are_those_that_were_counted():
    shown = re.search(r"<!-- tests/faults/results.md -->\n(.*?)<!-- end -->", README, re.DOTALL).group(1)
    assert f"\n{shown.strip()}\n" in (ROOT / "tests" / "faults" / "results.md").read_text()


def test_every_make_target_that_the_readme_names_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", README))
    assert {"demo", "test", "ui"} <= named <= targets


def test_the_verdict_in_the_readme_is_the_reports():
    verdict = next(line for line in (ROOT / "metrics" / "report.md").read_text().splitlines() if line.startswith("> "))
    assert verdict in README.splitlines()


@pytest.mark.parametrize("study", ["mnist", "pneumoniamnist"])
def test_the_counts_of_the_studies_are_those_of_their_tables(study: str):
    table = (ROOT / "metrics" / "studies" / f"{study}.md").read_text()
    counts = re.search(r"at 95 % each: (.*?)\. ", table).group(1)
    assert counts in README
    verdicts = [line.split("|")[-2].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(verdicts) >= 24
    possible = ("better", "worse", "not distinguishable")
    assert counts == ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in possible)
