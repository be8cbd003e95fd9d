"""Make a registered version of the student the champion by hand: `make promote VERSION=2`."""

from pipeline.errors import run
from pipeline.params import load_params
from pipeline.registry import CHAMPION, NAME, promote
from pipeline.tracking_store import Store


def main(version: str) -> None:
    promote(Store(load_params().tracking.experiment).client, version)
    print(f"{NAME} version {version}: {CHAMPION}")


if __name__ == "__main__":
    run(main, version=None)
