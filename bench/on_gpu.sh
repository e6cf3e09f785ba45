#!/usr/bin/env bash
# Build for the GPU at hand, run the tests that need one, then measure: bench/on_gpu.sh OUT [PYTHON]
# PYTHON is an interpreter whose environment has torch with CUDA; OUT receives logs and pytest-benchmark's JSON.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bench/on_gpu.sh OUT [PYTHON]}")
python=${2:-python3}
mkdir -p "$out"
failed=0
step() { # step NAME COMMAND...: its output goes to OUT/NAME.log; a failure is told and the rest still runs
    local name=$1
    shift
    echo "== $name"
    "$@" >"$out/$name.log" 2>&1 || { failed=1; echo "   failed, see $name.log"; tail -n 15 "$out/$name.log"; }
}
arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
export KR_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch"
step build "$python" setup.py build_ext --inplace
step info "$python" -m kr_fast info
step tests_gpu "$python" -m pytest -q -m gpu
step tests_ops "$python" -m pytest -q tests/ops -m "not interpreter and not compile"
for bench in bench/bench_*.py; do
    name=$(basename "$bench" .py)
    step "$name" "$python" -m pytest -q "$bench" --benchmark-json="$out/$name.json"
done
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv >"$out/device.csv"
exit "$failed"
