.PHONY: demo test mutations dev doctor lint env kernels-check kernels-table cuda-check bench-cpu sanitize gpu
# Bytecode that is not kept makes every subprocess of the tests compile its imports again.
unexport PYTHONDONTWRITEBYTECODE

demo: env
	.venv/bin/univigu demo --output-path demo-out

test: env
	.venv/bin/python -m pytest -q -n 2 --dist loadfile tests

# Plants seeded bugs in a copy of the kernels, one at a time; every one must make its tests fail.
mutations: env
	.venv/bin/python tests/mutations.py

dev: env
	.venv/bin/python -c "import engine; print(engine.explain())"

doctor: env
	.venv/bin/univigu env

lint: env
	.venv/bin/python -m ruff check .

# Compiles every Triton kernel for sm_80, sm_90 and sm_100 (no GPU needed) and reads the machine code.
kernels-check: env
	PYTHONPATH=kernels .venv/bin/python bench/aot.py --check $(OPS)

kernels-table: env
	PYTHONPATH=kernels .venv/bin/python bench/aot.py --write $(OPS)

# Compiles csrc/cuda for sm_80, sm_90a and sm_100a where nvcc is; ARGS=--write renews the table.
cuda-check: env
	PYTHONPATH=. .venv/bin/python bench/cuda_check.py $(ARGS)

# The engine on this CPU beside diffusers, interleaved; 25 minutes.
bench-cpu: env
	PYTHONPATH=kernels:. .venv/bin/python bench/cpu.py --output bench/results/cpu

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; 3 minutes.
sanitize: env
	tests/sanitize.sh tests/test_cpu_*.py

# Needs an NVIDIA GPU: kernel tests in bf16, compute-sanitizer, every operation against its peers.
gpu: env
	bench/gpu.sh

env:
	@.ci/env.sh
