.PHONY: setup demo test lint bench peers clean

setup:
	@scripts/setup

demo: setup
	@scripts/setup client
	@folder=$$(.venv/bin/python scripts/fetch_models.py SmolLM2-135M-Instruct) && \
		exec .venv/bin/python scripts/demo.py "$$folder" .venv-client/bin/python

test: lint
	@.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	@.venv/bin/python -m ruff check
	@.venv/bin/python -m ruff format --check
	@.venv/bin/python -m mypy

bench: setup
	@.venv/bin/python scripts/fetch_models.py SmolLM2-135M-Instruct >/dev/null
	@.venv/bin/python benchmarks/run.py

# The libraries that `make bench` stands beside, each in an environment of its own; without them it skips their lines.
peers: setup
	@.venv/bin/python benchmarks/peers/install.py

# The environments and fetched models stay: they are slow to make and never stale.
clean:
	rm -rf build dist .cache .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find client server tests scripts -name __pycache__ -prune -exec rm -rf {} +
