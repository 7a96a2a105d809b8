# A thin front: each target is a command or two that can be typed by hand.
#
#   make demo       handwritten digits through Kafka's protocol and back; nothing to install or start
#   make test       lint, types, and every test; starts an Apache Kafka of its own, or says why it cannot
#   make lint       ruff, and mypy in strict mode
#   make soak       the end-to-end scenarios at full size: kill -9, broker restarts, rebalances; takes long
#   make bench      every benchmark beside its peers; tables here, JSON in benchmarks/results/
#   make servers    Kafka, RabbitMQ, SQS and S3 on this machine, without Docker; make servers-stop ends them
#   make clean      remove what the targets above have made, but .venv and downloaded servers

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := client connectors models worker
# The peers of the benchmarks import libraries that only their own environments have.
CHECKED := --exclude '^benchmarks/peers/' $(PACKAGES:%=-p inferbus.%) -p tests -p examples -p deploy -p benchmarks
BENCHMARKS := bus_bound binary model_bound latency memory startup codec_cost rabbitmq sqs s3_sink files

.PHONY: demo test lint soak bench servers servers-stop clean

demo: $(VENV)/installed
	@$(BIN)/inferbus demo $(ARGS)
	@echo "inferbus is in $(BIN): run \`. $(BIN)/activate\` first."

test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	MYPYPATH=$(VENV)/types $(BIN)/mypy $(CHECKED)

soak: $(VENV)/installed
	INFERBUS_SOAK=1 $(BIN)/python -m pytest -m "broker or soak" $(ARGS)

bench: $(VENV)/installed
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(ARGS) || exit 1; done

servers: $(VENV)/installed
	@$(BIN)/python deploy/local/servers.py start $(ARGS)

servers-stop:
	@$(BIN)/python deploy/local/servers.py stop $(ARGS)

clean:
	rm -rf build dist *.egg-info inferbus-demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# The stamp keeps reruns quick: installed again only when what is to be installed has changed.
$(VENV)/installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Inferbus needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Inferbus and what it needs into $(VENV)/: once, about half a minute." >&2
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@# mypy does not follow the import hook of an editable install, so it is shown the packages under their names.
	@mkdir -p $(VENV)/types/inferbus
	@for package in $(PACKAGES); do ln -sfn ../../../$$package $(VENV)/types/inferbus/$$package; done
	@touch $@
