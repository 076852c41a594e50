.PHONY: screenshots setup demo serve lab bench test test-slow test-faults test-postgres test-ray test-vllm test-quantized check docs wheel clean
VENV := .venv
PY := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
# Compiled files are kept: a minute of the tests is servers that come up, and assertions that pytest rewrites.
unexport PYTHONDONTWRITEBYTECODE

setup: $(VENV)/.ready  ## virtual environment with the dev extra, pinned

$(VENV)/.ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## watch a served model get better from simulated picks
	$(VENV)/bin/pairloop demo

serve: setup  ## serve the embedded model with the loop on http://127.0.0.1:8000
	test -f pairloop-data/pairloop.toml || $(VENV)/bin/pairloop init pairloop-data
	$(VENV)/bin/pairloop serve --config pairloop-data/pairloop.toml

lab: setup  ## is it as good as RL? the gradients to machine precision, then one small task at equal rollouts
	$(VENV)/bin/pairloop lab equivalence
	$(VENV)/bin/pairloop lab compare --quick

bench: setup  ## training, sampling and the loop beside TRL and transformers; into bench-out/
	$(VENV)/bin/pairloop bench

test: setup  ## the default suite, under three minutes on two cores
	$(PY) -m pytest -n 3 --dist worksteal

test-slow: setup  ## demo, crashes under load, browser, wheel
	$(PY) -m pytest -m slow --timeout 1500

test-faults: setup  ## kills at every labelled point and at random times, full disks, clocks that jump; under four minutes on two cores
	$(PY) -m pytest -m faults -n 2 --dist worksteal

test-postgres: setup  ## every test that opens a store on a PostgreSQL that the tests start, and what is PostgreSQL's own
	$(PY) -m pytest --database postgres -n 2 --dist worksteal -r s
	$(PY) -m pytest --database postgres -m postgres -r s --timeout 900

test-ray: setup  ## runs as jobs of a Ray that the tests start (adds the extra; three minutes)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(PY) -m pytest -m ray --timeout 900

test-vllm: setup  ## the remote policy on a real vLLM; PAIRLOOP_VLLM_PYTHON names the Python of an environment that has it
	$(PY) -m pytest -m vllm -s -v -rs --timeout 900

test-quantized: setup  ## bases in 4 bits (adds the extra)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[quantized]'
	$(PY) -m pytest tests/test_quantized.py

screenshots: setup  ## every page as a picture, light, dark and phone, into screenshots/; needs chromium
	$(PY) -m tests.screenshots

check: setup  ## format, lint, types, layers, dead code, dependencies, generated docs
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/vulture
	$(VENV)/bin/deptry src
	$(PY) docs/generate.py --check

docs: setup  ## rewrite the generated pages of docs/ from the code and the results
	$(PY) docs/generate.py

wheel: setup  ## build dist/*.whl
	$(PY) -m build --wheel

clean:
	rm -rf $(VENV) dist build demo-out bench-out
