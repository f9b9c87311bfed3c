# Needs Python >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo-output

.DEFAULT_GOAL := help
.PHONY: help install dev demo demo-surgery ablation test test-extra test-demo parity check format bench clean

help:
	@echo "make install     .venv with the tool at .venv/bin/unet-surgery"
	@echo "make demo        prune the toy teacher with bk_tiny, distil the student, and show both in an HTML page"
	@echo "make demo-surgery   prune a full-size SD v1 U-Net (random weights) with bk_tiny, check it, show the plan"
	@echo "make ablation    what each term of the loss is good for, on the toy world, and a longer run (two hours)"
	@echo "make test        the tests"
	@echo "make test-demo   the tests of unet-surgery demo, in an environment of their own, with gradio"
	@echo "make parity      the libraries that published scores came from, in an environment of their own, against the goldens"
	@echo "make check       lint, types, import contracts"
	@echo "make bench       the measurements that the README quotes"

.venv/.python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	touch $@

.venv/.tool: pyproject.toml constraints.txt | .venv/.python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train]"
	touch $@

# The tool with what tests it, at once.
.venv/.dev: pyproject.toml constraints.txt | .venv/.python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,dev]"
	touch $@ .venv/.tool

install: .venv/.tool

dev: .venv/.dev

demo: .venv/.tool
	$(BIN)/python examples/toy_world/demo.py --out $(DEMO)

demo-surgery: .venv/.tool
	$(BIN)/unet-surgery plan --recipe bk_tiny --teacher sd-v1-random
	$(BIN)/unet-surgery prune --recipe bk_tiny --teacher sd-v1-random --out $(DEMO)-surgery --force
	$(BIN)/unet-surgery check $(DEMO)-surgery --teacher sd-v1-random

# One thread for each of the two workers: small networks are slower with more, threefold where cores are shared. Each
# takes half of the files, and then of what is left of the other's: what a file prepares is prepared once.
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not extra"

test-extra: .venv/.dev
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=extra $(BIN)/python -m pytest -n 2 -rs

# All exact, and without what they ask for besides: hpsv2 wants an old pytest.
.venv-parity/.made: parity-constraints.txt
	test -x .venv-parity/bin/python || $(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r parity-constraints.txt
	touch $@

parity: .venv-parity/.made
	OMP_NUM_THREADS=1 .venv-parity/bin/python tools/parity.py $(if $(WRITE),--write)

# gradio wants an older pillow than the rest is tested with.
.venv-demo/.made: pyproject.toml demo-constraints.txt
	test -x .venv-demo/bin/python || $(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet --disable-pip-version-check -c demo-constraints.txt -e ".[demo,dev]"
	touch $@

test-demo: .venv-demo/.made
	OMP_NUM_THREADS=1 .venv-demo/bin/python -m pytest tests/test_studio.py tests/test_demo.py -rs

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.dev .venv-parity/.made
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/ldm.py
	$(BIN)/python benchmarks/hub.py
	$(BIN)/python benchmarks/training.py --size toy --parts
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/generation.py --pictures 8 --channels-last
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scoring.py --repeats 1 --what fid
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scoring.py --what is --count 256

ablation: .venv/.tool
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/longer_run.py

clean:
	rm -rf .venv .venv-parity .venv-demo $(DEMO) $(DEMO)-surgery local-ablation local-longer
