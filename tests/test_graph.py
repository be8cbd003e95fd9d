"""dvc.yaml against what the stages really import, read and write."""

import copy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from pipeline.params import load_params
from tests.conftest import small_checkout
from tests.graph_reads import ROOT, Reads, leaves, observe

STAGES = [
    "fetch_data@baselines",
    "fetch_data@distillation",
    "train_baselines@simple_cnn",
    "train_baselines@resnet18",
    "train_teacher",
    "distill_student",
    "train_student_alone",
    "evaluate@baselines",
    "evaluate@distillation",
    "export_student",
    "evaluate_export",
    "measure_cost@baselines",
    "measure_cost@distillation",
    "report@baselines",
    "report@distillation",
]


DECIDE_NO_BYTE = frozenset({"jobs", "tracking.experiment"})  # parameters of no stage


@dataclass(frozen=True)
class Declared:
    cmd: str
    deps: frozenset[str]
    params: frozenset[str]
    outs: frozenset[str]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose two tracks read a small set, few epochs."""
    return small_checkout(tmp_path_factory.mktemp("graph") / "checkout").folder


def declared(folder: Path) -> dict[str, Declared]:
    """The stages that DVC sees in a folder, parameters spelt out to single values."""
    params = load_params(folder / "params.yaml")
    found = {}
    with Repo(str(folder)) as repo:
        for stage in repo.index.stages:
            deps = {dep.def_path for dep in stage.deps if not hasattr(dep, "params")}
            named = [name for dep in stage.deps if hasattr(dep, "params") for name in dep.params]
            found[stage.name] = Declared(
                stage.cmd, frozenset(deps), frozenset(params.flat(*named)), frozenset(out.def_path for out in stage.outs)
            )
    return found


def covers(paths: frozenset[str], path: str) -> bool:
    return any(path == one or path.startswith(f"{one}/") for one in paths)


def problems(stage: Declared, reads: Reads) -> list[str]:
    """How the declaration of a stage differs from what it does."""
    code = {dep for dep in stage.deps if dep.startswith("pipeline/")}
    data = stage.deps - code
    beside = {str(parent) for path in reads.written for parent in Path(path).parents}  # tidied up before writing
    read = {path for path in reads.files - reads.written - beside if not covers(stage.outs, path)}
    return [
        *(f"imports {path}, no dependency" for path in reads.code - code),
        *(f"depends on {path}, not imported" for path in code - reads.code),
        *(f"reads {name}, not under params" for name in reads.params - stage.params - DECIDE_NO_BYTE),
        *(f"has {name} under params, never reads it" for name in stage.params - reads.params),
        *(f"reads {path}, no dependency" for path in read if not covers(data, path)),
        *(f"depends on {path}, never reads it" for path in data if not any(covers(frozenset([path]), r) for r in read)),
        *(f"writes {path}, no output" for path in reads.written if not covers(stage.outs, path)),
    ]


@pytest.fixture(scope="module")
def observed(checkout: Path) -> dict[str, Reads]:
    """Every stage, run in the order of the graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        patch.setenv("DVC_ROOT", str(checkout))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        stages = declared(checkout)
        return {name: observe(stages[name].cmd) for name in STAGES}


def test_the_graph_has_the_stages_and_tracks_of_the_design(checkout: Path):
    assert set(declared(checkout)) == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_exactly_what_it_reads_and_writes(checkout: Path, observed: dict[str, Reads], name: str):
    assert problems(declared(checkout)[name], observed[name]) == []


def test_only_evaluations_read_a_test_split(observed: dict[str, Reads]):
    readers = {name for name, reads in observed.items() if any("/test/" in path for path in reads.files - reads.written)}
    assert readers == {"evaluate@baselines", "evaluate@distillation", "evaluate_export"}


def test_every_parameter_is_read_by_some_stage(checkout: Path, observed: dict[str, Reads]):
    read = set().union(*(reads.params for reads in observed.values()))
    assert read == leaves(load_params(checkout / "params.yaml"))


def entries() -> dict[str, list[tuple[str, str]]]:
    """Every entry under deps and params, by the stage of dvc.yaml."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    bodies = {name: stage.get("do", stage) for name, stage in stages.items()}
    return {name: [(key, entry) for key in ("deps", "params") for entry in body.get(key, [])] for name, body in bodies.items()}


def test_any_entry_left_out_of_deps_or_params_is_found(checkout: Path, observed: dict[str, Reads], tmp_path: Path):
    whole = yaml.safe_load((checkout / "dvc.yaml").read_text())
    shutil.copytree(checkout, tmp_path / "copy", ignore=shutil.ignore_patterns("data", "models", "metrics", "mlartifacts"))
    unnoticed = []
    for left_out in zip_longest(*([(name, *entry) for entry in found] for name, found in entries().items())):
        # one entry of each stage that has so many: stages are judged one by one
        changed = copy.deepcopy(whole)
        for name, key, entry in filter(None, left_out):
            body = changed["stages"][name].get("do", changed["stages"][name])
            body[key].remove(entry)
        (tmp_path / "copy" / "dvc.yaml").write_text(yaml.safe_dump(changed))
        stages = declared(tmp_path / "copy")
        for name, key, entry in filter(None, left_out):
            affected = [stage for stage in stages if stage.split("@")[0] == name]
            if not any(problems(stages[stage], observed[stage]) for stage in affected):
                unnoticed.append((name, key, entry))
    assert unnoticed == []


def test_dvc_and_mlflow_send_nothing_home(tmp_path: Path):
    config = (ROOT / ".dvc" / "config").read_text()
    assert "analytics = false" in config
    assert "check_update = false" in config
    asked = "import pipeline.tracking.mirror, mlflow.telemetry.client as t; print(t.get_telemetry_client())"
    done = subprocess.run(  # with no environment that would turn it off by itself, such as CI
        [sys.executable, "-c", asked], cwd=ROOT, env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None"
