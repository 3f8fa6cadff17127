# Everything is driven by these; `make up` and `make test` are all that a newcomer needs.
#   PYTHON=…            the interpreter to start with (3.11 or later)
#   KUBECONFIG=…        with `up`: use that cluster instead of building one (see e2e/existing.py for the images)
#   MAINSAIL_CLUSTER=own  with `up`: build one, though a kind or k3d cluster runs
#   MAINSAIL_PORT=…     the gateway's port on 127.0.0.1; MAINSAIL_API_PORT=… the API server's
PYTHON ?= python3
VENV := .venv/bin

# A KUBECONFIG of the environment may be our own, from .run/env: only one given to make counts.
ifeq ($(origin KUBECONFIG),command line)
UP_FLAGS := --kubeconfig $(KUBECONFIG)
endif

.PHONY: up down status test lint types unit e2e model venv
.NOTPARALLEL:

up:
	@$(PYTHON) -m e2e.up $(UP_FLAGS)

down:
	@$(PYTHON) -m e2e.down

status:
	@$(PYTHON) -m e2e.cluster status

venv:
	@$(PYTHON) -m e2e.venv

model:
	@$(PYTHON) -m e2e.model

test: lint types unit e2e

lint: venv
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/lint-imports

types: venv
	$(VENV)/basedpyright

unit: model
	$(VENV)/python -m pytest tests

e2e: model
	$(VENV)/python -m pytest e2e
