"""Open MLflow's UI on the table of results: `make ui` (PORT=5000). Ctrl-C ends it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import webbrowser

from pipeline.core.cli import read_port, run
from pipeline.core.errors import user_error
from pipeline.core.tracking_uri import masked, tracking_uri
from pipeline.params import load_params
from pipeline.tracking.mirror import PARENT
from pipeline.tracking.store import open_store

VIEW = "results"
# Tags of runs: widths in pixels.
COLUMNS = {"varied": 240, "gain": 310, "verdict": 140, "accuracy": 160, "auc": 190, "dataset": 120}


def prepare_view(experiment: str) -> str:
    """Put the view into the experiment and return its address in the UI, from the `#` on.

    A view is what MLflow keeps when somebody shares one: a tag of the experiment that the page's address names. It holds the
    run of every model and setting, the most accurate first.
    """
    client, experiment_id = open_store(experiment)
    widths = {f"tags.`{name}`": width for name, width in COLUMNS.items()}
    state = {
        "searchFilter": f"tags.{PARENT} != ''",
        "orderByKey": "metrics.`test_accuracy`",
        "orderByAsc": False,
        "selectedColumns": [*widths],
        "columnOrder": [*widths],
        "columnWidths": widths,
    }
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(state))
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"


def main() -> None:
    """Serve until interrupted."""
    port = read_port(os.environ.get("PORT") or "5000")
    uri, page = tracking_uri(), prepare_view(load_params().tracking.experiment)
    if uri.startswith("http"):  # a server has its pages
        print(f"{masked(uri)}{page}")
        return
    with user_error(f"cannot listen on 127.0.0.1:{port}", OSError, then="make ui PORT=... names another port"):
        socket.create_server(("127.0.0.1", port)).close()
    address = f"http://127.0.0.1:{port}{page}"
    print(f"{address}\n\nThe table of results. Ctrl-C ends it.", flush=True)
    threading.Thread(target=_open, args=(port, address), daemon=True).start()
    command = ["mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    stores = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_REGISTRY_STORE_URI": uri}  # an argument would show a password to all users
    variables = os.environ | stores | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # whose processes outlive the server
    subprocess.run([sys.executable, "-m", *command], check=False, env=variables, stderr=subprocess.DEVNULL)  # noqa: S603 (ours)


def _open(port: int, address: str) -> None:
    """Show the page, once the server answers, where there is a browser to show it."""
    answers = False
    while not answers:
        time.sleep(0.5)
        with socket.socket() as probe:
            answers = probe.connect_ex(("127.0.0.1", port)) == 0
    webbrowser.open(address)


if __name__ == "__main__":
    run(main)
