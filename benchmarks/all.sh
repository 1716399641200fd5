#!/usr/bin/env bash
# Measures everything and writes docs/benchmarks.md:
#
#     bash benchmarks/all.sh
#
# It takes some hours on two cores that nobody else uses, and 3 GB of disk. Rows are added
# to benchmarks/results. Rivals need `bash benchmarks/rivals/install.sh` first: who has no
# environment is left out; so is the GPU where there is none. PYTHON names the interpreter. What
# fails is said at the end, and the exit code is then 1: the page has the other rows.

cd "$(dirname "$0")/.." || exit
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1
export PYTHON=${PYTHON:-python3}
unset OMP_NUM_THREADS OMP_WAIT_POLICY # an arrangement chooses its threads
failed=""

scripts="round_time rivals/compare limits scale scaling bandwidth private_rounds memory ranks"
for script in $scripts; do
    began=$SECONDS
    echo "== benchmarks/$script.py"
    "$PYTHON" "benchmarks/$script.py" || failed="$failed $script.py"
    echo "== $((SECONDS - began)) s"
done
bash benchmarks/gpu.sh || failed="$failed gpu.sh"
"$PYTHON" benchmarks/page.py || failed="$failed page.py"

[ -z "$failed" ] || { echo "failed:$failed" && exit 1; }
