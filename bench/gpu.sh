#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command of at most 9 minutes: builds the CUDA kernels
# where nvcc and ninja are, runs the kernel tests in bf16 and compute-sanitizer on a subset, then
# `univigu bench` of training steps, operations, forwards and captions. Results go to $1
# (default bench/results/gpu): build.log, tests.log, sanitizer.log, and train, ops, infer, caption
# and scale as .json, .md and .png. No speed is measured after a red test.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-bench/results/gpu}"
python="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
ends=$((SECONDS + 535))

# run LIMIT COMMAND...: at most LIMIT seconds, and no longer than what is left of all.
run() {
    local limit=$(($1 < ends - SECONDS ? $1 : ends - SECONDS))
    shift
    if ((limit < 10)); then
        echo "gpu.sh: no time left for: $*" | tee -a "$out/left-out.log"
        return 1
    fi
    timeout "$limit" "$@"
}

"$python" - << 'PY' || exit 1
import torch, triton
assert torch.cuda.is_available(), "gpu.sh: a CUDA device must be there; got none."
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
PY
run 90 "$python" setup.py build_ext --inplace > "$out/build.log" 2>&1 ||
    { tail -n 20 "$out/build.log"; exit 1; }
grep "left out" "$out/build.log"
kernels=(tests/test_{ops,adaln,qknorm_rope,rope3d,joint_attention,cross_attention}.py
         tests/test_{routed_ffn,fp8_linear,fp8_ffn,vocab_sample,vocab_loss,flow_step}.py
         tests/test_{gpu,gpu_steps,gpu_training}.py)
run 150 "$python" -m pytest -q -p no:cacheprovider --durations=10 "${kernels[@]}" 2>&1 |
    tee "$out/tests.log" | tail -n 40
red=${PIPESTATUS[0]}

if command -v compute-sanitizer > /dev/null; then
    run 50 compute-sanitizer --tool memcheck --error-exitcode 9 --launch-timeout 60 \
        "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py -k sanitized \
        > "$out/sanitizer.log" 2>&1
    echo "compute-sanitizer: exit $?" | tee -a "$out/sanitizer.log"
    tail -n 4 "$out/sanitizer.log"
else
    echo "compute-sanitizer: not installed" | tee "$out/sanitizer.log"
fi

if [[ $red -ne 0 ]]; then
    echo "gpu.sh: tests are red, nothing is timed. TIME_ANYWAY=1 times for debugging." >&2
    [[ "${TIME_ANYWAY:-0}" == 1 ]] || exit 1
fi
# What a benchmark has no time for is a line of its report.
bench() {
    run $(($2 + 20)) "$python" -m engine bench "$1" --device cuda --repeats 1 \
        --time-limit "$2" --output-path "$out/$1"
}
bench infer 100
bench ops 100
bench train 80
bench caption 50
bench scale 50
