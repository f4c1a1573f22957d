# make demo, make test, make size: the set-up happens by itself; only python3 (>= 3.10) with venv is needed.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test check size gpu

demo: $(INSTALLED)
	rm -rf runs/demo
	$(VENV)/bin/etrm train configs/cpu.toml --fast --set run.dir=runs/demo
	$(VENV)/bin/etrm eval runs/demo
	$(VENV)/bin/etrm solve runs/demo tests/data/task.json

test: $(INSTALLED)
	$(VENV)/bin/pytest -q -n 2 --dist worksteal

# mypy names a module after its folder, so it gets to see this one under the name of the package.
check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	ln -sfn '$(CURDIR)' $(VENV)/etrm_arc
	cd $(VENV) && bin/mypy --config-file etrm_arc/pyproject.toml etrm_arc/*.py

gpu: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.gpu

size: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.size

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[test]'
	touch $@
