#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of the tree
# and runs the tests of the operations on that copy. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="$PWD/.venv/bin/python"
tree="build/sanitized"
mkdir -p "$tree"
git ls-files -z --cached --others --exclude-standard | tar --null -T - -c | tar -x -C "$tree"
cd "$tree"
UNIVIGU_SANITIZE=address,undefined UNIVIGU_CUDA=0 "$python" setup.py -q build_ext --inplace
# Python itself leaks by design. Torch's own allocations are checked at their borders too.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)"
exec "$python" -m pytest -q -p no:cacheprovider -k "cpu and not pipeline" "$@"
