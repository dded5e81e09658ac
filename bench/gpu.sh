#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command of at most 9 minutes: builds the CUDA kernels
# where nvcc and ninja are, runs the kernel tests in bf16 and compute-sanitizer on a subset, then
# `univigu bench` of forwards and guided runs, operations, training steps, captions and sizes.
#
#     bench/gpu.sh [FOLDER [PART...]]    parts: tests sanitize infer ops train caption scale
#
# Without parts all of them in this order, until the time is over: left-out.log names what was not
# reached. Results go to FOLDER (default bench/results/gpu): build.log, tests.log, sanitizer.log,
# and a .json, .md and pictures of each benchmark. No speed is measured after a red test.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-bench/results/gpu}"
python="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
parts=("${@:2}")
((${#parts[@]})) || parts=(tests sanitize infer ops train caption scale)
mkdir -p "$out"
rm -f "$out/left-out.log"
[[ " ${parts[*]} " == *" tests "* ]] || echo "gpu.sh: tests is not asked for: none runs first."
failed=0
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
import sys, torch, triton
if not torch.cuda.is_available():
    sys.exit("gpu.sh: a CUDA device must be there; got none. See univigu env.")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
PY
run 90 "$python" setup.py build_ext --inplace > "$out/build.log" 2>&1 ||
    { tail -n 20 "$out/build.log"; exit 1; }
grep "left out" "$out/build.log"
kernels=(tests/kernels/test_{ops,adaln,qknorm_rope,rope3d,joint_attention,cross_attention}.py
         tests/kernels/test_{routed_ffn,fp8_linear,fp8_ffn,vocab_sample,vocab_loss,flow_step}.py
         tests/gpu)

tests() {
    run 150 "$python" -m pytest -q -p no:cacheprovider --durations=10 "${kernels[@]}" 2>&1 |
        tee "$out/tests.log" | tail -n 40
    [[ ${PIPESTATUS[0]} -eq 0 || "${TIME_ANYWAY:-0}" == 1 ]] && return
    echo "gpu.sh: tests are red, nothing is timed. TIME_ANYWAY=1 times for debugging." >&2
    exit 1
}

sanitize() {
    if ! command -v compute-sanitizer > /dev/null; then
        echo "compute-sanitizer: not installed" | tee "$out/sanitizer.log"
        return
    fi
    run 50 compute-sanitizer --tool memcheck --error-exitcode 9 --launch-timeout 60 \
        "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_gpu.py -k sanitized \
        > "$out/sanitizer.log" 2>&1
    echo "compute-sanitizer: exit $?" | tee -a "$out/sanitizer.log"
    tail -n 4 "$out/sanitizer.log"
}

# bench NAME SECONDS: what it has no time for is a line of its report.
bench() {
    local left=$((ends - SECONDS - 15))
    local limit=$(($2 < left ? $2 : left))
    run $((limit + 15)) "$python" -m engine bench "$1" --device cuda --repeats 1 \
        --time-limit "$limit" --output-path "$out/$1" || failed=1
}

for part in "${parts[@]}"; do
    case "$part" in
        tests | sanitize) "$part" ;;
        infer) bench infer 200 ;;
        ops) bench ops 140 ;;
        train) bench train 200 ;;
        caption) bench caption 120 ;;
        scale) bench scale 120 ;;
        *)
            echo "gpu.sh: PART must be tests, sanitize, infer, ops, train, caption or scale;" \
                "got $part. Correct the name." >&2
            exit 2
            ;;
    esac
done
exit $failed
