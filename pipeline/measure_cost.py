"""Stage measure_cost: what each of a track's models costs, observed on this machine.

Timings differ from run to run. They have a stage of their own, on which no result depends: only the report shows them.
"""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.networks.description import checkpoints_in
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.core.cli import run
from pipeline.evaluation.tracks import MODELS
from pipeline.core.files import md5, write_json
from pipeline.export.inference_cost import inference_cost
from pipeline.params import load_params
from pipeline.core.provenance import code_is_committed, commit, machine
from pipeline.tracking.mirror import Tracker


def main(track: str) -> None:
    tracker = Tracker(load_params().tracking.experiment)
    costs = {}
    for model in MODELS[track]:
        paths = checkpoints_in(Path("models") / track / model)
        classifier, description = load_checkpoint(paths[0], torch.device("cpu"))
        shape = description.dataset.image_shape
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            classifier.to("meta")(torch.zeros((1, *shape), dtype=torch.uint8, device="meta"))
        costs[model] = {
            "parameters": sum(tensor.numel() for tensor in classifier.parameters()),
            "multiply_adds": counter.get_total_flops() // 2,  # of one image
            "file_bytes": paths[0].stat().st_size,
            **inference_cost(paths[0], shape),
        }
        seconds = [found for path in paths if (found := tracker.training_seconds(md5(path))) is not None]
        if seconds:
            costs[model]["training_seconds"] = sum(seconds) / len(seconds)  # of one seed
    if track == "distillation":
        for path in sorted(Path("models/student").glob("*.onnx")):
            costs[path.stem] = {"file_bytes": path.stat().st_size, **inference_cost(path, shape)}
    where = {"machine": machine(), "commit": commit(), "code_is_committed": code_is_committed()}
    write_json(Path(f"metrics/{track}_costs.json"), {"models": costs, **where})
    for model, figures in costs.items():
        print(
            f"{model}: {figures['latency_ms']:.2f} ms per image, {figures['images_per_second']:,.0f} images/s in batches"
        )


if __name__ == "__main__":
    run(main, track=tuple(MODELS))
