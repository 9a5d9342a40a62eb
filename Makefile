# The same commands for people and for CI. `make` alone lists them.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# What make setup is told, for instance SETUP_FLAGS=--no-apt.
SETUP_FLAGS ?=
# What make bench and make loadtest are told, for instance LOADTEST_FLAGS="--users 80 --p99-ms 50".
BENCH_FLAGS ?=
LOADTEST_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-chart bench bench-jobs loadtest check format docs clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14
	@echo
	@echo "fraudgate itself, after make setup: $(BIN)/fraudgate --help"

setup: ## install what is missing: Python packages, Java, Redis, Kafka, schema registry
	@if [ -z "$(PYTHON)" ]; then \
		echo "setup: Python 3.11 or 3.12 is needed and not on PATH: as root, apt-get install python3; or make PYTHON=/path/to/python3.11" >&2; \
		exit 1; fi
	@$(PYTHON) -m deploy.bootstrap $(SETUP_FLAGS)

demo: setup ## the whole pipeline, from nothing to a table of results
	@$(BIN)/fraudgate demo

test: setup ## all tests but the slow ones, against the real components
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-slow: setup ## the slow tests too
	$(BIN)/pytest -m "not chart"

bench: setup ## measure gateway, peers, latency curve, with Spark: table, build/bench.json, build/latency.svg
	$(BIN)/fraudgate bench all $(BENCH_FLAGS)

bench-jobs: setup ## measure the Spark streams on one core
	$(BIN)/fraudgate bench jobs

loadtest: setup ## the SLA scenario by Locust: build/loadtest.html, fails when p99 or error budget is broken
	$(BIN)/fraudgate loadtest $(LOADTEST_FLAGS)

test-chart: setup ## the Helm chart against a real Kubernetes API server, which is built here once (a quarter of an hour)
	$(BIN)/python -m tests.chart.tools
	$(BIN)/pytest -m chart tests/chart

check: setup ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup ## write the generated pages (settings, metrics, policy.schema.json, list of features), the alerting rules, the chart's schema and the dashboards anew
	$(BIN)/python -m deploy.monitoring.rules
	$(BIN)/python -m deploy.pages.settings
	$(BIN)/python -m deploy.pages.features
	$(BIN)/python -m deploy.pages.metrics
	$(BIN)/python -m deploy.pages.policy_schema
	$(BIN)/python -m deploy.monitoring.dashboards --write

clean: ## stop what runs here, remove what was built; the cache of downloads stays
	@if [ -x $(BIN)/fraudgate ]; then $(BIN)/fraudgate down; fi
	rm -rf .venv build .fraudgate .mypy_cache .ruff_cache .pytest_cache .hypothesis
