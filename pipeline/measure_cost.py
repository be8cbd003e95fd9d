"""Stage measure_cost: observe what each of a track's models costs here. Timings differ: no result depends on this stage."""

from pathlib import Path
from statistics import fmean

from pipeline.core.cli import run
from pipeline.core.files import write_json
from pipeline.core.provenance import code_is_committed, commit, machine
from pipeline.export.inference_cost import inference_costs
from pipeline.networks.description import checkpoints_in, read_description
from pipeline.networks.outside import outside_in
from pipeline.params import TRACKS
from pipeline.training.cache import read_record, trainings_folder

OF_NETWORK = ("parameters", "multiply_adds", "training_seconds", "with_teacher_seconds")  # the same when it is exported


def main(track: str) -> None:
    costs, plan = {}, TRACKS[track]
    folders = {model: Path("models") / track / model for model in plan.models}
    paths = {model: checkpoints_in(folder) for model, folder in folders.items() if not outside_in(folder)}
    descriptions = {model: read_description(of_seeds[0]) for model, of_seeds in paths.items()}
    networks = {model: (it.architecture, str(it.arguments)) for model, it in descriptions.items()}
    files = {networks[model]: paths[model][0] for model in reversed(paths)}  # models of the same network cost the same
    exported = sorted((Path("models/exported") / track).glob("*.onnx"))
    measured = dict(zip([*files, *exported], inference_costs([*files.values(), *exported]), strict=True))
    for model, of_seeds in paths.items():
        costs[model] = {"file_bytes": of_seeds[0].stat().st_size} | measured[networks[model]]
        records = [read_record(trainings_folder(), read_description(path).digest) for path in of_seeds]
        if seconds := [record.seconds for record in records if record and record.seconds is not None]:
            costs[model]["training_seconds"] = fmean(seconds)  # of one seed
    distilled, teacher = costs[plan.distilled], costs.get(plan.teacher, {})
    if "training_seconds" in distilled.keys() & teacher.keys():
        teachers = len(read_description(paths[plan.distilled][0]).teachers_md5)
        distilled["with_teacher_seconds"] = distilled["training_seconds"] + teachers * teacher["training_seconds"]
    for path in exported:
        network = costs[plan.teacher if path.name.startswith("teacher") else plan.distilled]
        costs[path.name] = {key: network[key] for key in OF_NETWORK if key in network}
        costs[path.name] |= {"file_bytes": path.stat().st_size} | measured[path]
    code = {"commit": commit(), "code_is_committed": code_is_committed()}
    write_json(Path(f"metrics/{track}_costs.json"), {"models": costs, "machine": machine(), **code})
    for model, cost in costs.items():
        print(f"{model}: {cost['latency_ms']:.2f} ms per image, {cost['images_per_second']:,.0f} images/s in batches")


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
