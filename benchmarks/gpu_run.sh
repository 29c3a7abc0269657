#!/usr/bin/env bash
# Everything that needs a GPU, in one go and within ten minutes: correctness first, times second.
#
#   bash benchmarks/gpu_run.sh            on a machine with a CUDA GPU, torch, triton, numpy and pytest
#   bash benchmarks/gpu_run.sh --smoke    the same steps on the CPU with tiny shapes: does the script work?
#
# Nothing is timed unless the tests pass. Each part has its own limit, so a part that hangs does not cost the others;
# results of the parts that ended are in benchmarks/results/ (OUT=... for another directory). PYTHON=... chooses Python.
# Exit status: 0 all parts ended, 1 a test or a gate failed, 2 some part ran out of time or broke.
set -u
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
DEVICE=cuda
SMOKE=()
if [ "${1:-}" = "--smoke" ]; then
    DEVICE=cpu
    SMOKE=(--smoke)
    OUT="${OUT:-$(mktemp -d)}"
elif [ $# -gt 0 ]; then
    echo "usage: bash benchmarks/gpu_run.sh [--smoke]" >&2
    exit 1
fi
OUT="${OUT:-benchmarks/results}"
mkdir -p "$OUT"
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET SAELAB_KERNELS   # either would change what runs

"$PYTHON" - "$DEVICE" <<'PY' || exit 1
import sys

try:
    import numpy, pytest, torch, triton
except ImportError as error:
    sys.exit(f"refused: {error}; this needs torch, triton, numpy and pytest")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("refused: torch sees no CUDA device; --smoke tries the script on the CPU")
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "CPU"
print(f"{name}: torch {torch.__version__}, triton {triton.__version__}, numpy {numpy.__version__}")
PY

# 1. Correctness, up to 240 s. The addopts and warning filters of pyproject.toml need packages that are not here, and so
#    do test files that have nothing to do with a GPU.
if [ "$DEVICE" = cuda ]; then
    mapfile -t FILES < <(grep -lE 'mark\.(gpu|fused)' tests/kernels/test_*.py)
    CHOSEN=(-m "gpu or fused" "${FILES[@]}")
else
    CHOSEN=(-m "not gpu and not fused" tests/kernels/test_kernels_sparse.py)
fi
echo "== correctness"
timeout -k 10 "${TEST_SECONDS:-240}" "$PYTHON" -m pytest -q -x -o addopts= -o filterwarnings= -p no:cacheprovider "${CHOSEN[@]}"
status=$?
if [ $status -ne 0 ]; then
    echo "refused: the tests ended with status $status (124: out of time, 5: none was found), so nothing is timed" >&2
    exit 1
fi

# 2. Times. Whole steps and search first: they are what is claimed. Then single operations, small shapes first, as far as
#    the time goes: each shape writes its own file, so that what is done is kept.
failed=0
part() {  # part SECONDS NAME ARGUMENTS...
    local seconds="$1" name="$2"
    shift 2
    echo "== $name (at most $seconds s)"
    timeout -k 10 "$seconds" "$PYTHON" -m benchmarks "$@" --device "$DEVICE" --out "$OUT" ${SMOKE[@]+"${SMOKE[@]}"}
    local status=$?
    if [ $status -eq 3 ]; then
        echo "refused: a gate failed in $name, so nothing more is timed" >&2
        exit 1
    elif [ $status -ne 0 ]; then
        echo "$name did not end (status $status)" >&2
        failed=2
    fi
}
# compiling takes half a minute a shape, so of the compiled steps the better one alone
CONTENDERS="torch dense bfloat16,torch sparse float32,torch sparse bfloat16"
[ "$DEVICE" = cuda ] && CONTENDERS="$CONTENDERS,torch.compile dense bfloat16"
part 150 "whole steps" train --rounds 20 --only "$CONTENDERS"
part 60 "search" search --tokens 500000
OPS=()
[ "$DEVICE" = cpu ] && OPS=(--ops sparse_decode,feature_step)
part 110 "operations" ops --rounds 20 --time-limit 90 ${OPS[@]+"${OPS[@]}"}
# the plot and the table of a smoke run would show times that mean nothing
[ "$DEVICE" = cuda ] && [ "$OUT" = benchmarks/results ] && "$PYTHON" -m benchmarks report

echo "== results in $OUT: $(ls "$OUT" | tr '\n' ' ')"
exit $failed
