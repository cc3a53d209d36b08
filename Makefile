# One line of help per target: `make help`.
PYTHON ?= python3
VENV ?= .venv
ALGO ?= iql
CORL ?= upstream/CORL
CORL_COMMIT := 6afec90484bbf47dee05fdf525e26a3ebe028e9b
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev
SWEEP ?= sweeps/hopper_cpu.yaml
SWEEP_READY := $(VENV)/.ready-sweep

.DEFAULT_GOAL := help
.PHONY: help setup run test test-optional test-slow faults bounds lint format diff patches corl bench sweep report clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 15

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(DEV_READY): $(READY) requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(SWEEP_READY): $(READY) requirements-sweep.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-sweep.txt
	@touch $@

setup: $(READY)  ## make .venv with the pinned requirements

run: $(READY)  ## the main job: DARE-IQL on hopper, minutes on a laptop
	$(BIN)/python algorithms/dare_iql.py --config configs/iql/quick_start.yaml $(ARGS)

test: $(DEV_READY)  ## all tests but the slow instances of test-slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

# pip sees the pins of all files at once, so that an optional package changes none of them; the
# parts that d4rl was written for do not install on today's Python (see its file).
OPTIONAL_sweep := -r requirements.txt -r requirements-sweep.txt
OPTIONAL_minari := -r requirements.txt -r requirements-minari.txt
OPTIONAL_buffers := -r requirements.txt -r requirements-buffers.txt
OPTIONAL_video := -r requirements.txt -r requirements-video.txt
OPTIONAL_browser := -r requirements.txt -r requirements-browser.txt
OPTIONAL_robotics := -r requirements.txt -r requirements-robotics.txt
OPTIONAL_ogbench := -r requirements.txt -r requirements-ogbench.txt
OPTIONAL_d4rl := --no-deps -r requirements-d4rl.txt

install-%: $(DEV_READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(OPTIONAL_$*) \
		2>$(VENV)/$*.log || printf 'requirements-%s.txt cannot be installed here, so its tests are skipped: %s\n' \
		$* "$$(grep -m1 ERROR $(VENV)/$*.log)"

test-optional: install-sweep install-minari install-robotics install-ogbench install-buffers install-browser install-video install-d4rl  ## what `make test` skips: installs Ray, Minari, other benchmarks, d4rl, buffer libraries and playwright, where it can
	OMP_NUM_THREADS=1 $(if $(wildcard $(CORL)/algorithms),CORL_DIR=$(abspath $(CORL))) \
		$(BIN)/python -m pytest -m optional -rs $(ARGS)

faults: $(DEV_READY)  ## every way a run can go wrong, and how many end as they should
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults --all-faults $(ARGS)

test-slow: $(DEV_READY)  ## the slow instances that `make test` leaves out; before a release
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --all-faults -m whole $(ARGS)

bounds:  ## do the lowest and the newest versions of pyproject.toml work? gigabytes, minutes
	$(PYTHON) scripts/check_bounds.py $(ARGS)

lint: $(DEV_READY)  ## ruff and mypy: lint, imports, format, types of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_READY)  ## ruff: mend what it can
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

diff:  ## the method as a diff: make diff ALGO=iql
	@git --no-pager diff --no-index --stat algorithms/$(ALGO).py algorithms/dare_$(ALGO).py || true
	@git --no-pager diff --no-index algorithms/$(ALGO).py algorithms/dare_$(ALGO).py || true
	@test ! -f patches/$(ALGO).patch || { printf '\nThe same for CORL'"'"'s own file, patches/$(ALGO).patch:\n\n'; cat patches/$(ALGO).patch; }

patches: $(READY)  ## write patches/*.patch for upstream CORL: make patches CORL=path
	$(BIN)/python scripts/make_patches.py --write --corl $(CORL)

corl: $(READY) $(CORL)  ## patch an upstream CORL checkout (cloned, or CORL=path)
	$(BIN)/python scripts/make_patches.py --apply --corl $(CORL)

$(CORL):
	git clone --quiet https://github.com/tinkoff-ai/CORL $(CORL)
	git -C $(CORL) checkout --quiet $(CORL_COMMIT)

bench: $(READY)  ## updates per second: baseline against DARE, ratios of one run
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/update_speed.py $(ARGS)

sweep: $(SWEEP_READY)  ## a whole experiment on Ray; resumes: make sweep SWEEP=sweeps/hopper.yaml
	$(BIN)/python -m experiments.sweep $(SWEEP) $(ARGS)

report: $(READY)  ## every table and figure of results/ from stored runs
	$(BIN)/python -m experiments.report write $(ARGS)

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
