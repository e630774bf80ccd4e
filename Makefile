# make demo   compile, train, evaluate and predict on the photos under examples/
# make test   lint, types and tests (make check is the same)
# make test-device  bundles on an emulated arm64 board: docs/devices.md
# make test-fleet  a fleet of real processes on loopback, killed and gone on with: docs/fleet.md
# make fuzz   mutated bundles, personal models and photos, kills, failing disks: docs/trust.md
# make zoo    networks of libraries beside plain torch, for hours: docs/zoo.md (ZOO="--sample 5")
# make docs   the documentation as a site, build/site/index.html
# make clean  remove what they made
# All install what they need into .venv, again only when setup.cfg, pyproject.toml or this file changed.

PYTHON ?= python3
JOBS ?= 2

venv := .venv
bin := $(venv)/bin
installed := $(venv)/.installed

.PHONY: demo test check lint types tests test-device test-fleet docs fuzz clean

demo: $(installed)
	PATH="$(abspath $(bin)):$$PATH" examples/demo.sh

# Types are checked beside the tests: each of their workers waits now and then.
test check: $(installed) lint
	@$(MAKE) --no-print-directory --jobs=2 tests types

lint: $(installed)
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(installed)
	$(bin)/mypy

# Neighbours go to the same worker, so that what a file's tests share is made once.
tests: $(installed)
	$(bin)/pytest -n $(JOBS) --dist worksteal

test-device: $(installed)
	$(bin)/python tests/emulated/arm64.py
	$(bin)/pytest -n $(JOBS) --dist loadgroup -m emulated tests/emulated

test-fleet: $(installed)
	$(bin)/pytest -m superlink tests/fleet

docs: $(installed)
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build

zoo: $(installed)
	OMP_NUM_THREADS=1 $(bin)/python tests/zoo $(ZOO)

fuzz: $(installed)
	for engine in pytorch onnxruntime tvm; do \
	    $(bin)/python tests/fuzz/campaign.py --engine $$engine $(FUZZ) || exit 1; \
	    $(bin)/python tests/fuzz/kills.py --engine $$engine $(KILLS) || exit 1; \
	    $(bin)/python tests/fuzz/disk.py --engine $$engine || exit 1; \
	done

$(installed): Makefile setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: pbc needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Name another one: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(bin)/python || $(PYTHON) -m venv $(venv)
	$(bin)/python -m pip install --disable-pip-version-check -e '.[compile,onnx,tvm,cuda,models,fleet,docs,dev]'
	touch $@

clean:
	rm -rf $(venv) build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
