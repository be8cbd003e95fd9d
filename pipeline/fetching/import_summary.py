"""What import_images has made, and what it has left out, in Markdown."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from tabulate import tabulate

from pipeline.core.errors import one_line
from pipeline.fetching.labelled_files import ImageFile, LeftOut

UNKNOWN_PATIENTS = "not known: one patient's images may stand in two splits; --group or a table can say whose they are"
LISTED = 100  # names, for one reason


def summarise(
    title: str, files: Sequence[ImageFile], classes: Sequence[str], left_out: Sequence[LeftOut], pairs: Sequence[str]
) -> str:
    """Images by class and split, patients by split, `pairs` of equal images, and what was left out and why.

    `files` lie in the order of their splits; `title` says what they became.
    """
    splits = list(dict.fromkeys(file.split for file in files))
    counts = Counter((file.label, file.split) for file in files)
    labels = [*classes, *([""] if any(not file.label for file in files) else [])]
    rows = [[one_line(label or "(none)"), *(counts[label, split] for split in splits)] for label in labels]
    rows.append(["all", *(sum(file.split == split for file in files) for split in splits)])
    patients = {split: {file.patient for file in files if file.split == split} - {""} for split in splits}
    named = ", ".join(f"{len(patients[split]):,} in {split}" for split in splits if patients[split])
    lines = [
        title,
        "",
        tabulate(rows, ["class", *splits], "github", intfmt=","),
        "",
        f"Patients: {named or UNKNOWN_PATIENTS}.",
        "",
    ]
    lines += _list("equal images in two splits", pairs)
    reasons = defaultdict(list)
    for reason, name in left_out:
        reasons[reason].append(name)
    for reason, names in reasons.items():
        lines += _list(f"left out: {reason}", names)
    return "\n".join(lines).rstrip() + "\n"


def _list(heading: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield from (f"{len(names):,} {heading}", "", *(f"- {one_line(name)}" for name in names[:LISTED]))
        yield from (["- ..."] if len(names) > LISTED else [])
        yield ""
