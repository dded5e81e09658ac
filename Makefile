.PHONY: demo test soak torture mutations dev doctor lint lock env bench bench-cpu accuracy few-steps footprints pages doors kernels-check kernels-table \
	cuda-check sanitize floor gpu
# Bytecode that is not kept makes every subprocess of the tests compile its imports again.
unexport PYTHONDONTWRITEBYTECODE

demo: env
	.venv/bin/univigu demo --output-path demo-out

test: env
	.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

# What `make test` leaves out: runs killed at random moments, over and over, 4 minutes; then the table of the
# server in docs/server.md, with every count in tests/soak/run.py, 25 minutes.
soak: env
	.venv/bin/python -m pytest -q -m soak tests
	.venv/bin/python tests/soak/run.py --output-path bench/results/serve-soak.json $(ARGS)

# What docs/reliability.md counts, with every count in tests/torture/run.py; 20 minutes.
torture: env
	.venv/bin/python tests/torture/run.py --output-path bench/results/torture.json $(ARGS)

# Plants seeded bugs in a copy of the kernels, one at a time; every one must make its tests fail.
mutations: env
	.venv/bin/python tests/kernels/mutations.py

dev: env
	.venv/bin/python -c "import engine; print(engine.explain())"

doctor: env
	.venv/bin/univigu env

lint: env
	.venv/bin/python -m ruff check .

# Writes requirements.lock: what README's commands install on a CPU, with hashes; a minute.
lock: env
	.venv/bin/python .ci/lock.py

# Compiles every Triton kernel for five kinds of card (no GPU needed) and reads the machine code.
kernels-check: env
	PYTHONPATH=kernels .venv/bin/python bench/compiled/aot.py --check $(OPS)

kernels-table: env
	PYTHONPATH=kernels .venv/bin/python bench/compiled/aot.py --write $(OPS)

# Developers' timings of operation K (none: all), beside the kernels of commit BASE where one is named.
bench: env
	PYTHONPATH=.:kernels .venv/bin/python -m bench.developers --op "$(K)" --base "$(BASE)" $(ARGS)

# Compiles csrc/cuda for sm_80, sm_90a and sm_100a where nvcc is; ARGS=--write renews the table.
cuda-check: env
	PYTHONPATH=. .venv/bin/python bench/compiled/cuda_check.py $(ARGS)

# The tables of docs/measured.md. Times of the engine on this CPU beside its peers; 34 minutes.
bench-cpu: env
	.venv/bin/univigu bench infer --device cpu --output-path bench/results/cpu-infer
	.venv/bin/univigu bench caption --device cpu --output-path bench/results/cpu-caption
	.venv/bin/univigu bench train --device cpu --output-path bench/results/cpu-train

# Distils the model of the package to four steps without guidance; 75 minutes on one core.
few-steps: env
	.venv/bin/univigu preprocess --model-path engine/assets/tiny --synthetic 640 --output-path runs/few.safetensors
	OMP_NUM_THREADS=1 .venv/bin/univigu train --stage distill --teacher engine/assets/tiny --init-from engine/assets/tiny \
		--student-steps 4 --teacher-steps 8 --data runs/few.safetensors --batch-size 48 --steps 480 --warmup 15 --lr 7e-4 \
		--muon-lr 0.01 --ema 0.97 --lambda-text 0.2 --t2v-share 0.45 --v2t-share 0.1 --save-dtype float16 \
		--output-path runs/few
	OMP_NUM_THREADS=1 .venv/bin/univigu train --stage distill --teacher engine/assets/tiny --init-from runs/few/model \
		--student-steps 4 --teacher-steps 8 --guidance-scale 4 --matching 1 --data runs/few.safetensors --batch-size 48 \
		--steps 160 --warmup 40 --lr 2e-4 --muon-lr 0.004 --ema 0.97 --lambda-text 0.2 --t2v-share 0.45 --v2t-share 0.1 \
		--seed 1 --save-dtype float16 --output-path runs/matched
	.venv/bin/python -m engine.toy.pack runs/matched/model engine/assets/tiny/few_steps

# The model of the package on 200 held-out cases; 4 minutes.
accuracy: env
	PYTHONPATH=.:kernels .venv/bin/python -m bench accuracy

# What training needs of each rank, predicted; 5 minutes.
footprints: env
	PYTHONPATH=.:kernels .venv/bin/python -m bench footprints

# The generated tables and pictures of docs/.
pages: env
	PYTHONPATH=.:kernels .venv/bin/python -m bench pages

# The list of commands, flags and public names that a test holds; 2 seconds.
doors: env
	PYTHONPATH=.:kernels .venv/bin/python tests/support/doors.py

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; 3 minutes.
sanitize: env
	tests/kernels/sanitize.sh tests/kernels/test_cpu_*.py

# Builds with CUDA against torch 2.11 and Triton 3.6, the oldest that the package takes, and runs a
# subset of the tests; ARGS=newest takes the newest that pip gives. Gigabytes the first time.
floor:
	tests/kernels/floor.sh $(ARGS)

# Needs an NVIDIA GPU: first figures, then kernel tests in bf16. PARTS names others (see bench/gpu.sh).
gpu: env
	bench/gpu.sh bench/results/gpu $(PARTS)

env:
	@.ci/env.sh
