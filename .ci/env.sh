#!/usr/bin/env bash
# Makes .venv or brings it up to date. Returns at once while the stamp in .venv matches its inputs.
# PYTHON names the interpreter to build it from (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."

sources="$(find csrc -type f | sort)"
stamp="$(cat pyproject.toml setup.py constraints.txt .ci/env.sh $sources | cksum)"
[[ -f .venv/stamp && "$(< .venv/stamp)" == "$stamp" ]] && exit 0

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "env: PYTHON must be Python 3.11 or newer; got $python." \
        "Install one, then run PYTHON=python3.11 make." >&2
    exit 1
fi

has_gpu() { nvidia-smi -L > /dev/null 2>&1; }

system_torch() {
    "$python" - <<'PY'
import sys
from importlib import metadata

if sys.prefix != sys.base_prefix:  # a venv's own packages would not be seen through it
    sys.exit(1)
try:
    version = metadata.version("torch")
except metadata.PackageNotFoundError:
    sys.exit(1)
print(version)
sys.exit(tuple(map(int, version.split(".")[:2])) < (2, 11))
PY
}

make_venv() { [[ -x .venv/bin/pip ]] || "$python" -m venv "$@" .venv; }

pin="$(grep '^torch==' constraints.txt)"
triton=""
if has_gpu && version="$(system_torch)"; then
    echo "env: GPU found, keeping the system's torch $version"
    make_venv --system-site-packages
    pin="torch==$version"
    triton="/^triton==/d"  # that torch brought its own
elif has_gpu; then
    echo "env: GPU found without torch>=2.11, installing the default build"
    make_venv
    triton="/^triton==/d"  # torch's build names the one it needs
else
    make_venv
    echo "env: no GPU, asking for a CPU build of torch"
    .venv/bin/pip install -q "$pin+cpu" ||
        echo "env: the configured indexes offer no $pin+cpu, installing the default build"
fi

sed -e "s/^torch==.*/$pin/" -e "$triton" constraints.txt > .venv/constraints.txt
.venv/bin/pip install -q -c .venv/constraints.txt setuptools wheel ninja
.venv/bin/pip install -q -c .venv/constraints.txt --no-build-isolation \
    -e ".[models,video,serve,triton,train,dev]"
echo "$stamp" > .venv/stamp
