# SPDX-License-Identifier: Apache-2.0
# The commands of this repository; CI runs the same ones. Needs Python >= 3.11, git and make:
# uv is taken from PATH, or installed into .uv/ where there is none that can read this project.

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup test test-all check fix build smoke demo bench results release clean

PKG ?=
ARGS ?=
BUMP ?=
BENCH ?= *

UV := $(shell uv cache dir >/dev/null 2>&1 && command -v uv || echo .uv/bin/uv)
need := $(filter .uv/bin/uv,$(UV))
ALL := tenfold-core $(sort $(patsubst packages/%/pyproject.toml,%,$(wildcard packages/*/pyproject.toml)))
dir = $(if $(filter tenfold-core,$(PKG)),shared,packages/$(PKG))

# Optional parts that a package's own tests exercise and that are small enough for every machine.
extras.tenfold-core := --extra plot --extra sparse

# What `uv run` installs first. CI, which prepares its environment itself, passes SYNC=--no-sync.
SYNC ?= --locked $(if $(PKG),--package $(PKG) $(extras.$(PKG)),--all-packages) --group ci
alone = $(if $(PKG),$(if $(filter --no-sync,$(SYNC)),,--isolated))
where = $(if $(PKG),$(dir),-n 2)

# What runs a benchmark. A host without uv, such as one with a GPU and no network, says with its own
# Python: make bench PKG=hbp-spmv ARGS=--device=cuda \
#   RUN="env PYTHONPATH=shared/src:packages/hbp-spmv/src python3"
RUN ?= $(UV) run $(SYNC) python

help: ## list the targets
	@echo "make TARGET [PKG=<distribution>] [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | \
	  while IFS='	' read -r target does; do printf '  %-10s %s\n' "$$target" "$$does"; done
	@echo "distributions: $(ALL)"

setup: $(need) ## install every package and all tools into .venv
	$(UV) sync --locked --all-packages --group ci

test: $(need) ## tests without the slow and the GPU ones; PKG= runs one package in isolation
	$(UV) run $(SYNC) $(alone) pytest $(where) -m "not slow and not gpu" $(ARGS)

test-all: $(need) ## all tests; the GPU ones where nvidia-smi answers
	@if nvidia-smi >/dev/null 2>&1; then marks="slow or not slow"; else marks="not gpu"; fi; set -x; \
	  $(UV) run $(SYNC) $(alone) pytest $(where) -m "$$marks" $(ARGS)

check: $(need) ## formatting, lint, types, layers, lock, workspace rules, tables in the READMEs
	$(UV) lock --check
	$(UV) run $(SYNC) ruff format --check
	$(UV) run $(SYNC) ruff check
	$(UV) run $(SYNC) pyrefly check
	$(UV) run $(SYNC) lint-imports
	$(UV) run $(SYNC) python .github/scripts/check_workspace.py
	@$(MAKE) results ARGS=--check

fix: $(need) ## format and apply the lint fixes that are safe
	$(UV) run $(SYNC) ruff format
	$(UV) run $(SYNC) ruff check --fix

build: $(need) ## wheels and source archives of all packages into dist/
	rm -rf dist
	$(UV) build --all-packages --no-sources --out-dir dist

smoke: build ## install the wheels of PKG (or of each) alone and ask for the version
	@set -e; for name in $(or $(PKG),$(ALL)); do \
	  if [ "$$name" = tenfold-core ]; then run="python -m tenfold_core"; else run="$$name --version"; fi; \
	  echo "$$name: $$run" >&2; \
	  $(UV) run --isolated --no-project --find-links dist --with "$$name" -- $$run; \
	done

demo: $(need) ## the demonstration of PKG; without PKG, hbp-bench on matrices that it makes
ifeq ($(PKG),)
	$(UV) run --locked hbp-bench $(ARGS)
else
	$(UV) run --locked --package $(PKG) $(extras.$(PKG)) $(PKG) demo --out $(dir)/benchmarks/results/demo $(ARGS)
endif

bench: $(if $(filter file,$(origin RUN)),$(need)) ## the benchmarks of PKG, or its bench_$(BENCH).py; records go to benchmarks/results/
	@test -n "$(PKG)" || { echo "make bench: name the package, e.g. PKG=hbp-spmv" >&2; exit 2; }
	@set -e; for file in $(dir)/benchmarks/bench_$(BENCH).py; do \
	  test -f "$$file" || { echo "make bench: $(dir)/benchmarks has no bench_$(BENCH).py" >&2; exit 2; }; \
	  echo "$$file" >&2; $(RUN) "$$file" $(ARGS); \
	done

# A README with the marker line is rewritten by `python -m <module>.report [--check] <folder>`.
results: $(need) ## rewrite the README tables from the committed results
	@set -e; for readme in $$(grep -l '^<!-- results' shared/README.md packages/*/README.md 2>/dev/null); do \
	  folder=$${readme%/README.md}; name=$$(basename "$$folder" | tr - _); \
	  if [ "$$folder" = shared ]; then name=tenfold_core; fi; \
	  $(UV) run $(SYNC) python -m "$$name.report" $(ARGS) "$$folder"; \
	done

release: $(need) ## bump PKG by BUMP (major, minor, patch; none as it is), commit, tag; no push
	@test -n "$(PKG)" && test -n "$(BUMP)" || { echo "make release: give PKG= and BUMP=" >&2; exit 2; }
	@git diff --quiet HEAD -- || { echo "make release: commit or undo the changes first" >&2; exit 1; }
	@set -e; bump="--bump $(BUMP)"; if [ "$(BUMP)" = none ]; then bump=; fi; \
	  version=$$($(UV) version --package $(PKG) $$bump --dry-run --short); \
	  $(UV) run --no-project python .github/scripts/changelog.py $(PKG) "$$version"; \
	  if [ -n "$$bump" ]; then $(UV) version --package $(PKG) $$bump --no-sync; fi; \
	  $(UV) run --no-project python .github/scripts/check_workspace.py || \
	    { git checkout --quiet -- $(dir)/pyproject.toml uv.lock; exit 1; }; \
	  git diff --quiet HEAD -- || \
	    git commit --quiet -m "$(PKG): release $$version" -- $(dir)/pyproject.toml uv.lock; \
	  git tag -a "$(PKG)-v$$version" -m "$(PKG) $$version"; \
	  echo "tagged $(PKG)-v$$version; push the commit and the tag to publish it"

clean: ## remove environments, caches and builds
	rm -rf .venv dist .pytest_cache .ruff_cache .pyrefly_cache .import_linter_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -not -path './.uv/*' -not -path './.git/*' -prune -exec rm -rf {} +

.uv/bin/uv:
	@set -e; python=; for name in python3 python3.15 python3.14 python3.13 python3.12 python3.11; do \
	  if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	test -n "$$python" || { echo "make: found no Python >= 3.11 on PATH (tried python3, python3.11 to 3.15)" >&2; exit 1; }; \
	echo "installing uv into .uv/ with $$python" >&2; \
	{ "$$python" -m venv .uv && .uv/bin/pip install --quiet --disable-pip-version-check 'uv>=0.13,<0.14'; } || \
	  { rm -rf .uv; echo "make: could not install uv; python3-venv and access to a package index are needed" >&2; exit 1; }
