#!/usr/bin/env bash
# What needs an NVIDIA GPU, in parts of at most 4 minutes each, run in the order given.
#
#     bench/gpu.sh [OUT [PART...]]     OUT: default bench/results/gpu; no PART: figures tests
#
#     figures     forward and guided run, captions, training step, VAE and text encoder, in short
#     tests       kernel tests in bf16, graph replay and training, on all cores with pytest-xdist
#     labs        every backend of attention and experts in turns; one that hangs is left out
#     sanitize    Triton's concurrency sanitizer and compute-sanitizer, each on a subset
#     ops infer train caption around scale      one benchmark each, longer than in figures
#
# Everything is in OUT as it comes: build.log, tests.log, sanitizer.log, and for each benchmark a
# .log and a .json that is whole at any moment, at its end .md and pictures. What a limit cut off is
# in left-out.log. Whatever ends this script, SIGKILL too, ends what it started within 5 seconds.
# After red tests in the same call no speed is measured, but with TIME_ANYWAY=1.
#
# Nothing has to be installed. PYTHON names the interpreter; PYTHONPATH and TRITON_CACHE_DIR are
# kept. A compiled module that was brought along, fits and is newer than its sources is used as it
# is; BUILD=0 never builds, BUILD=1 always. PART_SECONDS changes the 4 minutes. DEVICE=cpu tries the
# parts without a GPU, at tiny sizes: no figure of that is one.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-bench/results/gpu}"
python="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
seconds="${PART_SECONDS:-240}"
device="${DEVICE:-cuda}"
parts=("${@:2}")
((${#parts[@]})) || parts=(figures tests)
for part in "${parts[@]}"; do
    [[ " figures tests labs sanitize ops infer train caption around scale " == *" $part "* ]] &&
        continue
    echo "gpu.sh: PART must be figures, tests, labs, sanitize, ops, infer, train, caption, around" \
        "or scale; got $part. Correct the name." >&2
    exit 2
done
mkdir -p "$out"
rm -f "$out/left-out.log"
[[ " ${parts[*]} " == *" tests "* ]] || echo "gpu.sh: tests is not asked for: none runs first."
failed=0

# What is started here carries a mark. The watch is in a session of its own, so that nothing which
# ends this script reaches it, and then ends all that has the mark.
export UNIVIGU_LANE="$$.$RANDOM$RANDOM"
watch() {
    marked() { grep -lzxs "UNIVIGU_LANE=$2" /proc/[0-9]*/environ | cut -d / -f 3; }
    while [[ "$(cat "/proc/$1/stat" 2> /dev/null)" == *") "[!Z]* ]]; do sleep 0.5; done
    for signal in TERM KILL; do
        for process in $(marked "$@"); do kill -"$signal" "$process"; done
        sleep 2
    done
}
env -u UNIVIGU_LANE setsid bash -c "$(declare -f watch); watch \"\$@\"" watch \
    $$ "$UNIVIGU_LANE" < /dev/null > /dev/null 2>&1 &

# run SIGNAL SECONDS COMMAND...: the signal ends it then, and SIGKILL 5 s later.
run() {
    timeout -k 5 -s "$1" "$2" "${@:3}"
    local code=$?
    ((code == 124 || code == 137)) &&
        echo "gpu.sh: after $2 s there was no time left for: ${*:3}" |
        tee -a "$out/left-out.log" >&2
    return $code
}

# bench NAME FILE SECONDS: what it has no time for is a line of its report. A file of an earlier
# call would be taken for this one's.
bench() {
    local limit=$(($3 > 25 ? $3 - 15 : $3 / 2 + 1))
    rm -f "$out/$2".{log,json,md} "$out/$2"-*.png
    run TERM "$3" "$python" -m engine bench "$1" --device "$device" --repeats 1 \
        --time-limit "$limit" --output-path "$out/$2" $quick 2>&1 | tee "$out/$2.log"
    ((PIPESTATUS[0] == 0)) || failed=1
}

figures() {
    bench infer figures-infer $((seconds * 2 / 5))
    bench caption figures-caption $((seconds / 5))
    bench train figures-train $((seconds / 5))
    bench around figures-around $((seconds / 5))
}

# SIGINT lets pytest say what failed until then. The most important ones come first.
tests() {
    local workers files code
    workers=$("$python" -c 'import os, xdist; print(min(14, os.cpu_count()))' 2> /dev/null)
    files=(tests/gpu tests/kernels/test_flash_hopper.py
        tests/kernels/test_{ops,joint_attention,cross_attention,routed_ffn,adaln,qknorm_rope}.py
        tests/kernels/test_{rope3d,fp8_linear,fp8_ffn,flow_step,vocab_loss,vocab_sample}.py)
    [[ $device == cpu ]] && files=(tests/gpu tests/bench/test_roofline.py)
    run INT $((seconds - 5)) "$python" -m pytest -v --tb=short -p no:cacheprovider \
        --durations=10 ${workers:+-n "$workers"} "${files[@]}" 2>&1 |
        tee "$out/tests.log" | tail -n 40
    code=${PIPESTATUS[0]}
    ((code == 0)) && return
    failed=1
    if ((code == 124 || code == 137)) && ! grep -qE "(FAILED|ERROR)" "$out/tests.log"; then
        echo "gpu.sh: tests did not end in time; none of those that ran is red."
    elif [[ "${TIME_ANYWAY:-0}" != 1 ]]; then
        echo "gpu.sh: tests are red, nothing is timed. TIME_ANYWAY=1 times for debugging." >&2
        exit 1
    fi
}

# sanitized NAME COMMAND...: half of the part's time.
sanitized() {
    run TERM $((seconds / 2)) "${@:2}" 2>&1 | tee -a "$out/sanitizer.log" | tail -n 4
    local code=${PIPESTATUS[0]}
    echo "$1: exit $code" | tee -a "$out/sanitizer.log"
    ((code == 0)) || failed=1
}

# Triton's sanitizer compiles a check of each barrier and buffer into the Gluon kernel, for one or
# two minutes: one case.
sanitize() {
    local pytest=("$python" -m pytest -q -p no:cacheprovider)
    : > "$out/sanitizer.log"
    [[ $device == cpu ]] || sanitized "concurrency sanitizer" \
        env TRITON_INSTRUMENTATION_MODE=consan "${pytest[@]}" tests/kernels/test_flash_hopper.py \
        -k "within_two_times and 260"
    if ! command -v compute-sanitizer > /dev/null; then
        echo "compute-sanitizer: not installed" | tee -a "$out/sanitizer.log"
        return
    fi
    sanitized compute-sanitizer compute-sanitizer --tool memcheck --error-exitcode 9 \
        --launch-timeout 60 "${pytest[@]}" tests/gpu/test_gpu.py -k sanitized
}

# Whether the module that is there can be used as it is. One that does not load would end all.
fits() {
    local module=(kernels/univigu_kernels/_C*.so) code
    [[ -e "${module[0]}" ]] || return 1
    "$python" -c 'import sys; from univigu_kernels import _compiled
sys.exit(3 if _compiled.missing(sys.argv[1]) else 0)' "$device" > "$out/module.log" 2>&1
    code=$?
    if ((code != 0 && code != 3)); then
        mv "${module[@]}" "$out"
        echo "gpu.sh: the compiled module does not load, see module.log; it is in $out now." |
            tee -a "$out/left-out.log"
    fi
    ((code == 0)) || return 1
    [[ "${BUILD:-}" == 0 || -z "$(find csrc setup.py -newer "${module[0]}" -print -quit)" ]]
}

build() {
    if [[ "${BUILD:-}" != 1 ]] && fits; then
        echo "gpu.sh: the compiled module that is there is used."
        return
    elif [[ "${BUILD:-}" == 0 ]]; then
        echo "gpu.sh: BUILD=0 and no compiled module for $device; the others are measured." |
            tee -a "$out/left-out.log"
        return
    fi
    if ! run TERM "$((seconds < 90 ? seconds : 90))" "$python" setup.py build_ext --inplace \
        > "$out/build.log" 2>&1; then
        tail -n 20 "$out/build.log"
        echo "gpu.sh: the compiled module was not built, see build.log; the others are measured." |
            tee -a "$out/left-out.log"
    fi
    grep "left out" "$out/build.log"
}

if [[ $device == cpu ]]; then
    quick="--quick"
    echo "gpu.sh: DEVICE=cpu tries the parts at tiny sizes; no figure of it is one."
else
    quick=""
    "$python" - << 'PY' || exit 1
import sys, torch, triton
if not torch.cuda.is_available():
    sys.exit("gpu.sh: a CUDA device must be there; got none. See univigu env.")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
PY
fi
build
for part in "${parts[@]}"; do
    case "$part" in
        figures | tests | sanitize) "$part" ;;
        *) bench "$part" "$part" "$seconds" ;;
    esac
done
exit $failed
