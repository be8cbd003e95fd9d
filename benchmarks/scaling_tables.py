"""The figures of benchmarks/scaling.py as tables, and what follows from them for more than was run."""

import math
from typing import Any

from tabulate import tabulate

SIZES = (28, 64, 128, 224)  # pixels a side
BATCH = 64
IMAGE = (224, 224, 3)
COUNTED_STAGES = ("train_teacher", "distill_student", "train_student_alone", "evaluate")


def table(rows: list[list[Any]], *headers: str) -> str:
    """A Markdown table of what is already text."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("years", 31_557_600), ("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def amount(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"


def sizes_table(part: dict[str, Any]) -> str:
    """Images per second by network and size of image."""
    rows = [
        [
            role,
            *(f"{part[role][str(side)]['images_per_second']:,.0f}" for side in SIZES),
            f"{part[role]['224']['parameters'] / 1e6:.1f} M",
            f"{part[role]['224']['anonymous_mib']:,.0f}",
        ]
        for role in ("simple_cnn", "resnet18", "teacher", "student")
    ]
    pixels = [f"{side}x{side}" for side in SIZES]
    return table(rows, "images / s, training", *pixels, "parameters at 224", "MiB for a step at 224")


def streaming_table(part: dict[str, Any]) -> str:
    """In memory against streamed."""
    rows = []
    for role in ("tiny", "simple_cnn"):
        here, there = part[role]["in_memory"], part[role]["streamed"]
        share = there["images_per_second"] / here["images_per_second"]
        rows.append(
            [
                role,
                f"{here['images_per_second']:,.0f}",
                f"{there['images_per_second']:,.0f}",
                f"{share:.2f}",
                f"{there['anonymous_mib']:,.0f}",
                f"{part[role]['rows']:,}",
            ]
        )
    return table(
        rows, "network", "in memory, images / s", "from disk, images / s", "ratio", "anonymous MiB", "images read"
    )


def processes_table(part: dict[str, Any]) -> str:
    """One process against two."""
    rows = []
    for role in ("simple_cnn", "resnet18"):
        one, wide, two = (part[role][name] for name in ("1 x 1", "1 x 2", "2 x 1"))
        rows.append([role, f"{one:.1f}", f"{wide:.1f}", f"{two:.1f}", f"{one / wide:.2f}", f"{one / two:.2f}"])
    headers = (
        "1 process, 1 thread, s",
        "1 process, 2 threads, s",
        "2 processes, 1 thread each, s",
        "threads",
        "processes",
    )
    return table(rows, "training", *headers)


def losses_table(part: dict[str, Any]) -> str:
    """How far two processes' losses lie from one's."""
    rows = [[parts, *(f"{one:.0e}" for one in differences)] for parts, differences in part["losses"].items()]
    return table(rows, "micro_batches", *(f"epoch {number + 1}" for number in range(len(rows[0]) - 1)))


def tracking_table(part: dict[str, Any]) -> str:
    """What a training sends."""
    names = {"train_teacher": "teacher", "distill_student": "distilled student", "train_student_alone": "student alone"}
    names |= {"evaluate": "evaluation of all three"}
    rows = [
        [name, f"{part[key]['requests']:.0f}", amount(part[key]["bytes"]), f"{part[key]['seconds']:.2f}"]
        for key, name in names.items()
    ]
    return table(rows, "per seed", "requests", "bytes both ways", "seconds waited")


def study_sentence(part: dict[str, Any]) -> str:
    """What the study took one after another, on Ray, and with a killed worker."""
    return (
        f"A study of {part['trainings']} small trainings (mnist5k, 5 epochs) and 6 evaluations, each with one thread: one after"
        f" another {part['seconds_one_by_one']:.0f} s, on Ray with {part['workers']} workers {part['seconds_on_ray']:.0f} s:"
        f" **{part['speedup']:.2f} times as fast**, the start of Ray included ({part['tasks_speedup']:.2f} times from the first"
        f" task's start to the last one's end). With a worker killed on the way: {part['seconds_on_ray_worker_killed']:.0f} s;"
        f" {part['tasks_done_twice_worker_killed']} task was begun again and went on from its progress."
    )


def study_projection(study: dict[str, Any], tracking: dict[str, Any]) -> str:
    """Studies of many trainings: what they would take."""
    rate = study["trainings_per_second_on_ray"]
    asked = sum(tracking[stage]["seconds"] for stage in COUNTED_STAGES) / 3  # of the server, per training
    requests = sum(tracking[stage]["requests"] for stage in COUNTED_STAGES) / 3
    kept = sum(tracking[f"{what}_bytes"] for what in ("database", "artifact", "checkpoint"))
    rows = []
    for count in (100, 1_000, 10_000):
        for cores in (2, 64, 1024):
            compute, served = count / (rate * cores / study["workers"]), count * asked
            bottleneck = "arithmetic" if compute > served else "the tracking server"
            spent = duration(max(compute, served))
            rows.append(
                [f"{count:,}", f"{cores:,}", spent, bottleneck, f"{count * requests:,.0f}", amount(count * kept)]
            )
    return table(rows, "trainings", "cores", "time", "bottleneck", "requests to the server", "stored")


def images_projection(sizes: dict[str, Any], streaming: dict[str, Any]) -> str:
    """Sets of many images at 224x224: what an epoch of each network would take on one device."""
    read = streaming["tiny"]["streamed"]["images_per_second"]
    rows = []
    for count in (10_000, 100_000, 1_000_000, 10_000_000):
        for role in ("student", "simple_cnn", "resnet18"):
            trained = sizes[role]["224"]["images_per_second"]
            parameters = sizes[role]["224"]["parameters"]
            rows.append(
                [
                    f"{count:,}",
                    role,
                    amount(count * math.prod(IMAGE)),
                    duration(count / min(trained, read)),
                    "arithmetic" if trained < read else "reading",
                    amount(8 * 4 * count),
                    amount(4 * 4 * parameters + sizes[role]["224"]["anonymous_mib"] * 2**20),
                    amount(trained * math.prod(IMAGE)),
                    amount(4 * parameters * -(-count // BATCH)),
                ]
            )
    headers = ("images", "network", "on disk", "an epoch", "bottleneck", "labels and order", "model and step")
    return table(rows, *headers, "reads per second", "gradients sent per process and epoch")


def markdown(kept: dict[str, Any]) -> str:
    """The tables of the parts that have been measured, and what follows from them."""
    text = []
    if part := kept.get("sizes"):
        text += ["One device, generated colour images in batches of 64, the second epoch:", sizes_table(part)]
    if part := kept.get("streaming"):
        text += [
            f"A generated set of {part['images']:,} images at 224x224, {amount(part['bytes'])}, against {part['in_memory']:,}"
            " such images in memory; nothing of the set was in the system's cache at the start:",
            streaming_table(part),
        ]
    if part := kept.get("processes"):
        text += [
            "The default baselines on PneumoniaMNIST (5 epochs, one seed), medians:",
            processes_table(part),
            "How far the training losses of two processes lie from those of one, relatively (SimpleCNN, fp32):",
            losses_table(part),
        ]
    if part := kept.get("tracking"):
        text += [
            "To an MLflow server on the same machine, per seed (5 epochs), and stored per training:",
            tracking_table(part),
            f"Database {amount(part['database_bytes'])}, artifacts {amount(part['artifact_bytes'])}, checkpoint"
            f" {amount(part['checkpoint_bytes'])}.",
        ]
    if part := kept.get("study"):
        text += [study_sentence(part)]
    if {"study", "tracking"} <= kept.keys():
        text += [
            "Projected from these figures, not run: trainings like those of the study, on cores like these.",
            study_projection(kept["study"], kept["tracking"]),
        ]
    if {"sizes", "streaming"} <= kept.keys():
        text += [
            "Projected, not run: an epoch at 224x224 on this device.",
            images_projection(kept["sizes"], kept["streaming"]),
        ]
    runs = [[name, part["commit"], *part["machine"].values()] for name, part in kept.items()]
    return "\n\n".join([*text, table(runs, "part", "commit", *next(iter(kept.values()))["machine"])]) + "\n"
