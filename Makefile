# Two commands for a fresh machine with Python 3.11 to 3.13: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
# Notebooks and tests that need the same small run share what one of them has done of it
export SYNAPSECLR_SHARED_FIXTURES := $(CURDIR)/build/fixtures

.PHONY: install demo cortex test test-engines check notebooks site results narrowed same_bytes clean

install: $(BIN)/.installed

# torch first: a CPU build where there is one, and no other package may choose
$(BIN)/.installed: settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

demo: install
	synapseclr demo

test: install check notebooks site
	OMP_NUM_THREADS=1 python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder tests

# SLURM, S3, SQS, graphene and CAVE instead of stand-ins: installed for the tests, started, stopped and deleted
test-engines: install
	tests/engines/run.sh

# Package, notebooks and README say the same; the code is tidy
check: install
	nbdev_export
	nbdev_clean
	git diff --exit-code -- nbs synapseclr
	ruff check nbs tests
	ruff check --select F821 synapseclr # names that only the tests of a notebook import

notebooks: install
	rm -rf build/fixtures
	OMP_NUM_THREADS=1 timeout 1500 nbdev_test --n_workers 2

site: install
	synapseclr_docs
	git diff --exit-code -- README.md

# Mouse cortex, from the stacks in ../shared/data: layers and tables, then a run of all stages
cortex: install
	python -c "from synapseclr.evaluate.kasthuri import convert_all; convert_all('../shared/data', '_runs/kasthuri')"
	synapseclr run --config configs/ac3.toml

# Every stored table, figure and output that comes from the demo, anew
results: install
	synapseclr demo
	synapseclr figures _runs/demo
	synapseclr_results --run _runs/demo
	synapseclr_docs

# What compares bytes, once more as processors without some instructions of this one would compute it
narrowed: install
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(MAKE) same_bytes
	ONEDNN_MAX_CPU_ISA=AVX512_CORE $(MAKE) same_bytes
	ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 $(MAKE) same_bytes

same_bytes:
	for nb in learn/06_precision learn/10_train learn/11_extract 90_cli; do OMP_NUM_THREADS=1 nbdev_test --path nbs/$$nb.ipynb || exit 1; done
	OMP_NUM_THREADS=1 python -m pytest -q -rs -n 2 --dist loadfile tests/test_same_numbers.py tests/test_processes.py tests/test_line.py

clean:
	rm -rf _docs _proc _runs build *.egg-info
