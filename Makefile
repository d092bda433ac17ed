# The three commands of the README. Everything lands in .venv, .azurite, .azmcp, .kusto, .powerbi, .dagster_home and data, all ignored by git.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export DAGSTER_HOME := $(CURDIR)/.dagster_home
# a Cosmos DB in memory that lives as long as the command after it; none where a real one is set
COSMOS := $(if $(AOAI_COSMOS_ENDPOINT),,$(BIN)/python -m aoai_usage_pipeline_tests.cosmos_server --)

.PHONY: demo dev test bench docs clean

demo: .venv/ready $(DAGSTER_HOME)/dagster.yaml
	@$(BIN)/aoai-usage simulate
	@$(BIN)/aoai-usage bill --from 2026-08-16 --to 2026-09-30
	@echo "Next: make dev, then open http://127.0.0.1:3000"

dev: .venv/ready $(DAGSTER_HOME)/dagster.yaml
	AOAI_AUTOMATION=running $(COSMOS) $(BIN)/dg dev --host 127.0.0.1 --port 3000

test: .venv/ready-for-tests .azurite/ready .azmcp/ready .kusto/ready .powerbi/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2 -m "slow or not slow"

bench: .venv/ready-for-tests
	$(BIN)/python benchmarks/capture_to_daily.py
	PYTHONPATH=. $(BIN)/python benchmarks/cosmos_publish.py

docs: .venv/ready
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .azurite .azmcp .kusto .powerbi .dagster_home data

.venv/ready: requirements.lock pyproject.toml
	@echo "Installing into .venv (once, about a minute)"
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 is needed; name it with make PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

.venv/ready-for-tests: .venv/ready requirements-test.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-test.lock
	@touch $@

.azurite/ready: .venv/ready-for-tests
	$(BIN)/npm install --no-package-lock --no-audit --no-fund --loglevel=error --prefix .azurite azurite@3.37.0
	@touch $@

.azmcp/ready: .venv/ready-for-tests
	$(BIN)/npm install --no-package-lock --no-audit --no-fund --loglevel=error --prefix .azmcp @azure/mcp@2.0.5
	@touch $@

# Microsoft's parser and checker of Kusto queries
.kusto/ready: .venv/ready-for-tests
	$(BIN)/npm install --no-package-lock --no-audit --no-fund --loglevel=error --prefix .kusto @kusto/language-service-next@12.4.1
	@touch $@

# Microsoft's tools that read the Power BI project; the wheel is taken for the libraries in it, and not installed
.powerbi/ready: .venv/ready-for-tests
	$(BIN)/npm install --no-package-lock --no-audit --no-fund --loglevel=error --prefix .powerbi \
		@microsoft/powerbi-report-authoring-cli@0.1.4 @microsoft/powerbi-core-visual-schema@0.1.1 @microsoft/powerquery-parser@2.0.0
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .powerbi python_tabular==0.5.6
	$(BIN)/python -m zipfile -e .powerbi/python_tabular-0.5.6-py3-none-any.whl .powerbi/python_tabular
	@touch $@

$(DAGSTER_HOME)/dagster.yaml: dagster.yaml
	mkdir -p $(DAGSTER_HOME)
	cp dagster.yaml $@
