.PHONY: demo test dev doctor lint env
# Bytecode that is not kept makes every subprocess of the tests compile its imports again.
unexport PYTHONDONTWRITEBYTECODE

demo: env
	.venv/bin/univigu demo --output-path demo-out

test: env
	.venv/bin/python -m pytest -q tests

dev: env
	.venv/bin/python -c "import engine; print(engine.explain())"

doctor: env
	.venv/bin/univigu env

lint: env
	.venv/bin/python -m ruff check .

env:
	@.ci/env.sh
