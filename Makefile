# Every verb creates .venv and installs what it needs, once. Works with GNU make 3.81 (macOS) and
# newer. Try `make help`.

PYTHON ?= python3
VENV ?= .venv
PRESET ?= sample
# Further options for the pipeline, e.g. ARGS="--force -p EPOCHS 3"
ARGS ?=
# For `make maps` and `make demo`: the network (none named: the one that comes with the package), the
# photos (of the demo: to verify the export with), and the port on this machine.
CHECKPOINT ?=
PHOTOS ?=
PORT ?= 8000
# The extra `parity` compiles pysaliency: without a C compiler, leave it out (its tests are skipped).
TEST_EXTRAS ?= notebooks,backbone,test,legacy,emd,export,cluster,study,video,parity,heic,colab

PY := $(VENV)/bin/python
NBVAL := --nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg

.DEFAULT_GOAL := help
.PHONY: help reproduce maps demo quick test style test-code test-notebooks publish address clean

help:
	@echo "make reproduce [PRESET=sample]  run all notebooks: data, training, scores, figures"
	@echo "                                PRESET is a name (sample, osie, ...) or a YAML file;"
	@echo "                                more options: ARGS='--force --data-root ~/data'"
	@echo "make maps PHOTOS=holiday/       saliency maps and overlays of photos, into maps/"
	@echo "make demo [CHECKPOINT=best.pt]  the network in your browser, on this machine; needs npm"
	@echo "                                PHOTOS='holiday/' verifies the exported network, PORT=8000"
	@echo "make quick                      style and the fast tests, in a minute or so"
	@echo "make test                       style, all tests, notebooks, one pipeline run"
	@echo "make publish                    copy the sample run's notebooks and figures into the"
	@echo "                                repository"
	@echo "make address                    write the address in pyproject.toml into all links"
	@echo "make clean                      remove .venv and caches (keeps runs/ and data/)"
	@echo ""
	@echo "PYTHON=python3.12 chooses the interpreter for .venv (3.10 to 3.13)."

reproduce: $(VENV)/.reproduce
	$(PY) -m mlnet_utils reproduce --preset $(PRESET) $(ARGS)

maps: $(VENV)/.reproduce
	$(PY) -m mlnet_utils predict --out maps --overlay $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(PHOTOS)

# The runtime comes from npm, pinned in tools/demo.py; neither it nor the network is committed.
demo: $(VENV)/.demo
	$(PY) -m mlnet_utils export $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) \
		--out docs/demo/network.onnx $(PHOTOS)
	$(PY) tools/demo.py --port $(PORT)

quick: $(VENV)/.test style
	$(PY) -m pytest -n auto --dist worksteal -m "not slow and not realdata"

# A process a core, a thread a process: tests start further processes, and more threads than
# cores slow all of them down.
quick test: export OMP_NUM_THREADS = 1

# At the same time: a notebook keeps only one core busy.
test: $(VENV)/.test style
	$(MAKE) --jobs 2 test-code test-notebooks

style: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tools/address.py --check

test-code: $(VENV)/.test
	$(PY) -m pytest -n auto --dist worksteal

# The notebooks run in a temporary folder, at the size of preset tiny and with few trainings, in one
# process: a test must not touch the user's own runs, and what nbval compares (cells with its tag)
# is the same at every size.
test-notebooks: $(VENV)/.test
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && export MLNET_RUNS="$$runs" && \
	for notebook in notebooks/*.ipynb; do \
		sed -e '/PRESET: str/s/sample/tiny/' -e 's/SEEDS: int = 3/SEEDS: int = 2/' \
			-e 's/WORKERS: int = 2/WORKERS: int = 1/' \
			"$$notebook" >"$$runs/$${notebook##*/}" || exit 1; \
	done && \
	$(PY) -m mlnet_utils reproduce --preset tiny --run-dir "$$runs/pipeline" && \
	$(PY) -m pytest $(NBVAL) "$$runs"/*.ipynb

publish: $(VENV)/.reproduce
	$(PY) -m mlnet_utils publish --preset $(PRESET)

address:
	$(PYTHON) tools/address.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	{ echo "Python 3.10 to 3.13 is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	@! test -e $(VENV) || { echo "$(VENV) is there, without bin/python: remove it or set VENV"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Stamps: nothing is installed again until the requirements change.
$(VENV)/.reproduce: pyproject.toml constraints.txt | $(PY)
	@echo "Installing into $(VENV), once; torch alone is several hundred MB, with CUDA several GB."
	$(PY) -m pip install --constraint constraints.txt --editable ".[notebooks,backbone,study]"
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --constraint constraints.txt --editable ".[export]"
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --constraint constraints.txt --editable ".[$(TEST_EXTRAS)]"
	@touch $@ $(VENV)/.reproduce $(VENV)/.demo
