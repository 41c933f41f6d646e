# Needs make and Python >= 3.10; every target first sets up .venv here, which takes a minute once.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
# The name carries the folder, so that a clone that was moved or copied is set up again.
STAMP := .venv/ready-$(shell echo "$(CURDIR)" | cksum | cut -d ' ' -f 1)

.PHONY: demo test check docs clean

demo: $(STAMP)  ## train, predict, evaluate and report on the embedded scans
	.venv/bin/python -m fewscan demo -o demo

test: $(STAMP)  ## the fast tests
	scripts/test

check: $(STAMP)  ## linters and types
	scripts/check

docs: $(STAMP)  ## regenerate what is generated in docs/
	scripts/docs

clean:
	rm -rf .venv demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "needs Python >= 3.10 with venv (Debian: apt install python3-venv)" >&2; exit 2; }
	.venv/bin/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
