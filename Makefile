# make demo [WORKDIR=runs/vmoe_digits]  install into .venv (no CUDA), run the digits pipeline, and
#                                       write its report
# make test                             install into .venv-test; the checks of make lint, then every
#                                       lane of tests
# make lint                             formatter, linter and type checker
# make chaos [CHAOS_SEED=0]             kills, signals and damaged files at random, for hours;
#                                       CHAOS_CONFIGS=A,B: kills of other runs than the digits'
# make bucket [BUCKET_EPOCHS=2]         the digits pipeline in a bucket on loopback, killed twice; 0:
#                                       the epochs of the config
# make experiments [SEEDS=5]            install likewise, and run experiments/fashion for both
#                                       families, for hours; a second call goes on
# make docs                             docs/config.md from the keys of the config
# make clean
# PYTHON=python3.12 chooses the interpreter (3.11 or newer).

PYTHON ?= python3
WORKDIR ?= runs/vmoe_digits
WORKERS ?= 2
LANES := unit parity multidevice e2e chaos

# Python compiles a module when it is first imported; compiling all of them takes half of the installing.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile
# The tests convert to and from torch. The package index's own torch for Linux brings gigabytes of
# CUDA, so this exact version is first looked for where it is built without (TORCH_INDEX= : not).
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test lint chaos bucket experiments docs clean python
.DELETE_ON_ERROR:

demo: .venv/stamp
	.venv/bin/python -m m2mkd_jax.main --config=configs/vmoe_digits.py --workdir=$(WORKDIR)
	.venv/bin/python -m m2mkd_jax.report $(WORKDIR) --no_analysis

# Lanes are separate processes: one has eight CPU devices, the others one.  All run, whatever fails;
# pytest itself fails a lane with no test in it, tests/conftest.py one with a forbidden skip.
test: .venv-test/stamp
	@failed=; $(MAKE) --no-print-directory lint || failed=" lint"; \
	for lane in $(LANES); do \
	  echo "== tests/$$lane"; \
	  JAX_PLATFORMS=cpu .venv-test/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	    tests/$$lane || failed="$$failed tests/$$lane"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

lint: .venv-test/stamp
	@failed=; for check in "ruff format --check ." "ruff check ." mypy; do \
	  echo "== $$check"; .venv-test/bin/$$check || failed=1; \
	done; test -z "$$failed"

CHAOS_SEED ?= 0
CHAOS_CONFIGS ?= configs/nac_digits.py,configs/vmoe_digits.py
chaos: .venv-test/stamp
	JAX_PLATFORMS=cpu CHAOS_SEED=$(CHAOS_SEED) CHAOS_CONFIGS=$(CHAOS_CONFIGS) \
	  CHAOS_KILLS=50 CHAOS_SIGNALS=40 CHAOS_FILES=5000 \
	  .venv-test/bin/python -m pytest -s tests/chaos tests/chaos/long_kills.py
	JAX_PLATFORMS=cpu CHAOS_SEED=$(CHAOS_SEED) CHAOS_CONFIGS=$(CHAOS_CONFIGS) \
	  CHAOS_KILLS=10 CHAOS_PROCESSES=2 \
	  .venv-test/bin/python -m pytest -s tests/chaos/long_kills.py -k killed

BUCKET_EPOCHS ?= 2
bucket: .venv-test/stamp
	JAX_PLATFORMS=cpu BUCKET_EPOCHS=$(BUCKET_EPOCHS) .venv-test/bin/python -m pytest -s \
	  tests/chaos/long_bucket.py

SEEDS ?= 5
experiments: .venv/stamp
	.venv/bin/python -m experiments.fashion.run vmoe --seeds=$(SEEDS)
	.venv/bin/python -m experiments.fashion.run nac --seeds=$(SEEDS)

docs: .venv-test/stamp
	.venv-test/bin/python -m m2mkd_jax.config.document > docs/config.md

clean:
	rm -rf .venv .venv-test build dist .pytest_cache .ruff_cache .mypy_cache \
	  *.egg-info
	find m2mkd_jax tests configs benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null; true

# The stamps make a second call install nothing, until pyproject.toml changes.
.venv/stamp: EXTRA := [report]
.venv-test/stamp: EXTRA := [test]
.venv/stamp .venv-test/stamp: pyproject.toml setup.py | python
	test -x $(@D)/bin/pip || $(PYTHON) -m venv --clear $(@D)
	$(if $(filter [test],$(EXTRA)),$(@D)/bin/python -m pip install $(PIP_FLAGS) --no-deps --retries 0 --timeout 20 \
	  $(addprefix --extra-index-url ,$(TORCH_INDEX)) '$(TORCH)')
	$(@D)/bin/python -m pip install $(PIP_FLAGS) -e '.$(EXTRA)'
	touch $@

python:
	@command -v $(PYTHON) >/dev/null || { echo "no interpreter '$(PYTHON)': give one with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "m2mkd_jax needs Python 3.11 or newer, $(PYTHON) is `$(PYTHON) --version 2>&1`: give another with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install the system package python3-venv, or give another interpreter with make PYTHON=..." >&2; exit 1; }
