# Set-up and checks. `make demo` and `make test` work on a fresh machine: they create .venv and install into it.
PYTHON ?= python3
WORKERS ?= 2

# DeepSpeed looks for ninja on the PATH when it compiles an operator.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help demo fast test test-all test-release test-lowest lint docs
help:
	@echo "make demo   train the embedded model with AGRPO; ARGS=\"--seed 1\" is passed to the recipe"
	@echo "make fast   run the quick tests; ARGS=\"-k sampling\" is passed to pytest, here and below"
	@echo "make test   run the tests, WORKERS=2 files at a time"
	@echo "make test-all   run the thorough ones too: further backends, and the commands of the documentation"
	@echo "make test-release   run those that are left: more backends, killed runs and benchmarks, minutes each"
	@echo "make test-lowest   run the tests of \"make fast\" on the lowest versions that pyproject.toml admits, in .venv-lowest"
	@echo "make lint   check style, formatting and types"
	@echo "make docs   build the documentation into site/"

# Without the number of threads accelerate gives a process on the CPU one; the demo is sized for two cores.
demo: .venv/installed
	.venv/bin/accelerate launch --config_file trl_diffusion/accelerate_configs/single_gpu.yaml --num_cpu_threads_per_process 2 \
		recipes/gsm8k_agrpo.py $(ARGS)

# One thread for each worker: together they already use the cores.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses $(WORKERS) --dist loadfile --durations=25

fast: .venv/installed-dev
	$(PYTEST) -m "not slow and not thorough" $(ARGS)

test: .venv/installed-dev
	$(PYTEST) -m "not thorough" $(ARGS)

test-all: .venv/installed-dev
	$(PYTEST) -m "not release" $(ARGS)

# Run by hand, before a release, as the next one.
test-release: .venv/installed-dev
	$(PYTEST) -m release $(ARGS)

# Programs that tests start (accelerate, ninja) must come from the same environment.
test-lowest: .venv-lowest/installed
	PATH="$(CURDIR)/.venv-lowest/bin:$$PATH" OMP_NUM_THREADS=1 .venv-lowest/bin/pytest --numprocesses $(WORKERS) \
		--dist loadfile -m "not slow and not thorough" $(ARGS)

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/installed-docs
	.venv/bin/mkdocs build --strict --config-file docs/mkdocs.yml

.venv/installed-dev: EXTRAS = [dev,deepspeed,quantization,lm-eval]
.venv/installed-docs: EXTRAS = [docs]
.venv/installed .venv/installed-dev .venv/installed-docs: .venv/torch pyproject.toml
	.venv/bin/pip install -c constraints.txt -e ".$(EXTRAS)"
	touch $@

# torch comes first and at its pinned version, so that no other package chooses one.
.venv/torch: constraints.txt
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/pip install "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv-lowest/installed: constraints-lowest.txt pyproject.toml
	test -x .venv-lowest/bin/pip || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install "$$(grep '^torch==' constraints-lowest.txt)"
	.venv-lowest/bin/pip install -c constraints-lowest.txt -e ".[dev,deepspeed,quantization,lm-eval]"
	touch $@
