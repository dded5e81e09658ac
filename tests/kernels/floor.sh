#!/usr/bin/env bash
# Builds the extension with CUDA against a torch and a Triton of their own and runs a subset of the
# tests there: what pyproject.toml promises (`floor`: torch 2.11, Triton 3.6) and what comes next
# (`newest` that pip gives). Needs no GPU, but nvcc and 6 GB of disk each; the first run downloads.
#
#     tests/kernels/floor.sh [floor|newest]      PYTHON: the interpreter that the environment is of
#
# Everything is under build/floor: an environment and a copy of the tracked files, so that the
# working tree's own extension stays.
set -euo pipefail
cd "$(dirname "$0")/../.."
which="${1:-floor}"
case "$which" in
    floor) wanted=("torch==2.11.*" "triton==3.6.*" "numpy<2.4") ;; # Triton 3.6's interpreter
    newest) wanted=(torch triton numpy) ;;
    *)
        echo "floor.sh: the argument must be floor or newest; got $which. Correct it." >&2
        exit 2
        ;;
esac
home="$PWD/build/floor/$which"
python="$home/env/bin/python"
mkdir -p "$home/tree"
[[ -x "$python" ]] || "${PYTHON:-python3}" -m venv "$home/env"
"$python" -m pip install -q --upgrade "${wanted[@]}" ninja pybind11 "setuptools>=77" wheel \
    safetensors tqdm tyro pytest scipy transformers "diffusers>=0.38" ftfy pillow av

git ls-files -z --cached --others --exclude-standard | tar --null -T - -c | tar -x -C "$home/tree"
cd "$home/tree"
UNIVIGU_CUDA=1 "$python" setup.py -q build_ext --inplace > "$home/build.log" 2>&1 || {
    tail -n 20 "$home/build.log"
    exit 1
}
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests/support"
"$python" - << 'PY'
import platform

import torch
import triton
from univigu_kernels import _compiled

names = _compiled.build_info()["cuda_architectures"]
print(f"floor.sh: Python {platform.python_version()}, torch {torch.__version__},", end=" ")
print(f"triton {triton.__version__}, CUDA kernels for sm_{', sm_'.join(names.split())}")
PY
# The compiled module; every operation in fp32, Triton's kernels in its interpreter; the Gluon
# kernel on the tests' machine and loops in the frontend, which lean on Triton's insides; sampling
# by a whole pipeline of random weights.
exec "$python" -m pytest -q -p no:cacheprovider -k "not float16 or flash_hopper" \
    tests/kernels/test_compiled.py tests/kernels/test_cuda_*.py tests/kernels/test_ops.py \
    tests/kernels/test_{flash_hopper,ttgir,loop_variables}.py tests/sampling/test_pipeline.py
