# make run   the whole pipeline on the default model        make help   the rest
SHELL := /bin/bash
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3 python 2>/dev/null))
VENV := .venv
BIN := $(VENV)/bin
WITH_TRL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[parity]'
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK ?= true
export DVC_NO_ANALYTICS ?= 1

.PHONY: help run tiny test test-resume test-thorough test-online test-browser lint format ui prefect-ui repro known-answers reward-hacking golden mutants parity parity-training bench lock clean preflight room
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' Makefile

run: $(VENV)/.installed ## install, then prepare → sft → reward → ppo → dpo → evaluate → people
	@$(BIN)/rlhf run

tiny: $(VENV)/.installed ## the same flow with a random two-layer model, in about a minute
	@$(BIN)/rlhf run --recipe tiny

test: room ## lint, types, tests
	@$(MAKE) --no-print-directory lint
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations=15

test-resume: room ## kill the tiny recipe ten times; it has to end with the same bytes
	@$(BIN)/python -m pytest -m resume

test-thorough: room ## several training processes, and simulations that take long
	@$(BIN)/python -m pytest -m thorough

test-online: room ## online rounds by a rule, a person, a schedule and a coin, and killed in every phase
	@$(BIN)/python -m pytest -m online

test-browser: room ## the feedback pages in Chromium, and twenty people at once; SQLite and PostgreSQL
	@for tool in chromium chromedriver; do command -v $$tool >/dev/null || { \
	  echo "Found no $$tool. On Debian: apt-get install chromium chromium-driver" >&2; exit 1; }; done
	@$(BIN)/python -c 'import sys; sys.path.insert(0, "scripts"); import feedback_load; \
	  sys.exit(feedback_load.missing_for_postgres() or None)'
	@$(BIN)/python -m pytest -m browser

lint: $(VENV)/.installed ## what pre-commit checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## format, and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: $(VENV)/.installed ## MLflow's pages: compare runs
	@$(BIN)/rlhf ui

prefect-ui: $(VENV)/.installed ## Prefect's pages: flow runs, logs, schedules
	@$(BIN)/rlhf prefect-ui

repro: $(VENV)/.installed ## the same pipeline through DVC alone
	$(BIN)/dvc repro

known-answers: $(VENV)/.installed ## PPO on two tasks whose answer is known, four seeds each; about five minutes
	@$(BIN)/python scripts/known_answers.py

reward-hacking: $(VENV)/.installed ## PPO on rewards with a known flaw: is the alarm in time, and silent without one?
	@$(BIN)/python scripts/reward_hacking.py

golden: $(VENV)/.installed ## rewrite the golden numbers; review them as a diff
	$(BIN)/python scripts/golden.py

mutants: $(VENV)/.installed ## flip each line of the maths once; every mutant must be caught
	$(BIN)/python scripts/mutants.py

parity: $(VENV)/.installed ## hold the maths against TRL's, element by element
	@$(WITH_TRL)
	@$(BIN)/python scripts/parity_maths.py

parity-training: $(VENV)/.installed ## SFT and reward model beside TRL's, in hours: PAIRS=FILE OPTIONS=...
	@test -n "$(PAIRS)" || { echo "Found no PAIRS, expected a file: make parity-training PAIRS=pairs.jsonl.gz" >&2; exit 1; }
	@$(WITH_TRL)
	@$(BIN)/python scripts/parity_training.py $(PAIRS) $(OPTIONS)

bench: $(VENV)/.installed ## time and memory beside TRL's: OPTIONS="--only ppo_update"
	@$(WITH_TRL)
	@test -d artifacts/base || $(BIN)/rlhf run --until prepare
	@$(BIN)/python -m benchmarks.run $(OPTIONS)

lock: preflight ## pin the newest packages that fit, tried in a fresh environment
	$(PYTHON) scripts/lock.py

clean: ## remove caches and the tiny workspace; data, artifacts and run history stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .rlhf/tiny build *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

preflight:
	@test -n "$(PYTHON)" || { echo "Found no Python, expected 3.11 or newer. Install python3.11 and its venv module." >&2; exit 1; }
	@test -e $(VENV)/.installed || $(PYTHON) tasks/preflight.py --install

room: $(VENV)/.installed  # also where everything is installed: tests that fill a disk end in a heap of other errors
	@$(BIN)/python tasks/preflight.py --light

# The stamp is newer than what decides the environment, or the environment is brought up to date.
$(VENV)/.installed: pyproject.toml constraints.txt | preflight
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3.11-venv" >&2; rm -rf $(VENV); exit 1; }
	@echo "Installing the pinned packages into $(VENV) (about 1 GB; minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
