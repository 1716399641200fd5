#!/usr/bin/env bash
# Tests and timings on a machine with a CUDA GPU, in under 8 minutes and without a network:
#
#     bash benchmarks/gpu.sh
#
# It needs torch, numpy and pytest, and no installation of vecfl. Rows are added to gpu.jsonl,
# feed.jsonl and bandwidth.jsonl in benchmarks/results, or in the folder that OUT names. PYTHON names the
# interpreter, COMMIT the commit of a tree without git. The exit code is 0 if the tests passed and
# the timings ran, or if there is no GPU.

cd "$(dirname "$0")/.." || exit
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}/gpu.jsonl

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit
if [ "$gpus" = 0 ]; then
    echo "no CUDA GPU here: nothing to test and nothing to time"
    exit 0
fi

# cuBLAS reads its setting when it starts; deterministic products need this one. The options of
# pyproject.toml are left out because they ask for plugins.
CUBLAS_WORKSPACE_CONFIG=:4096:8 timeout --kill-after=5 230 "$python" -m pytest -v \
    -o addopts=--import-mode=importlib -W ignore::pytest.PytestConfigWarning -m gpu tests/gpu
tests=$?

timeout --kill-after=5 130 "$python" benchmarks/gpu_time.py --budget 110 --out "$out"
timings=$?

timeout --kill-after=5 50 "$python" benchmarks/feed.py --device cuda --out "${out%/*}/feed.jsonl"
feed=$?

timeout --kill-after=5 60 "$python" benchmarks/bandwidth.py --device cuda \
    --out "${out%/*}/bandwidth.jsonl"
bandwidth=$?

echo "tests ended with $tests, timings with $timings, data with $feed, bandwidth with $bandwidth;" \
    "rows are in ${out%/*}"
[ "$tests" = 0 ] && [ "$timings" = 0 ] && [ "$feed" = 0 ] && [ "$bandwidth" = 0 ]
