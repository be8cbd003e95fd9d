"""Send to MLflow what was kept while its server did not answer: `make send`."""

from pipeline.errors import run
from pipeline.params import load_params
from pipeline.tracking import Tracker
from pipeline.unsent import folder


def main() -> None:
    Tracker(load_params().tracking.experiment)
    left = sorted(folder().glob("*.jsonl"))
    print(f"tracking: {len(left)} files are left in {folder()}" if left else "tracking: nothing is left to send")


if __name__ == "__main__":
    run(main)
