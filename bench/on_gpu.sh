#!/usr/bin/env bash
# Build for the GPU at hand, run the tests that need one, then measure: bench/on_gpu.sh OUT [PYTHON]
# PYTHON is an interpreter whose environment has torch with CUDA, pybind11, pytest and pytest-benchmark; nothing is
# downloaded, and what needs a package that is missing (diffusers, liger-kernel) is skipped with that reason. OUT
# receives log.txt, device.csv and benchmarks.json, which is complete after each step. All of it ends within
# SECONDS_AT_MOST (570): a step that would not is cut short, and the log says so.
# KR_FAST_WHEEL=FILE tests and measures this wheel of the same commit in place of building: make one where no GPU waits,
# by TORCH_CUDA_ARCH_LIST=9.0 KR_FAST_CUDA=1 make wheel for an H100.
set -uo pipefail
root=$(realpath "$(dirname "$0")/..")
out=$(realpath -m "${1:?usage: bench/on_gpu.sh OUT [PYTHON]}")
python=${2:-python3}
if [[ $python == */* ]]; then python=$(realpath -s "$python"); fi
wheel=${KR_FAST_WHEEL:+$(realpath "$KR_FAST_WHEEL")}
cd "$root"
end=$((SECONDS + ${SECONDS_AT_MOST:-570}))
mkdir -p "$out"
: >"$out/log.txt"
failed=0
step() { # step NAME MOST_SECONDS COMMAND...: a failure is told, and the rest still runs
    local name=$1 most=$2 left=$((end - SECONDS)) begun=$SECONDS status=0
    shift 2
    if ((left < 5)); then
        echo "== $name: no time left" | tee -a "$out/log.txt"
        failed=1
        return
    fi
    echo "== $name" >>"$out/log.txt"
    timeout $((left < most ? left : most)) "$@" >"$out/step.log" 2>&1 || { status=$?; failed=1; }
    tail -c 200000 "$out/step.log" >>"$out/log.txt"
    echo "== $name: status $status, $((SECONDS - begun)) s" | tee -a "$out/log.txt"
    if ((status)); then tail -n 25 "$out/step.log"; fi
    rm -f "$out/step.log"
}
parts=$(mktemp -d)
join='import json, sys
parts = [json.load(open(path)) for path in sys.argv[2:]]
json.dump({**parts[0], "benchmarks": [each for part in parts for each in part["benchmarks"]]}, open(sys.argv[1], "w"))'
bench() { # bench NAME MOST_SECONDS ARGUMENT...: times are added to OUT/benchmarks.json; a step cut short leaves none
    local name=$1 most=$2
    shift 2
    step "$name" "$most" "$python" -m pytest -q -p no:cacheprovider "$@" --benchmark-json="$parts/$name.json"
    find "$parts" -maxdepth 1 -type f -size 0 -delete
    if compgen -G "$parts/*.json" >/dev/null; then "$python" -c "$join" "$out/benchmarks.json" "$parts"/*.json; fi
}
arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') ||
    { echo "on_gpu.sh: $python has no torch that sees a GPU"; exit 1; }
export KR_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch"
unset KR_FAST_WHEEL
query=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu
nvidia-smi --query-gpu=$query --format=csv >"$out/device.csv"
git log -1 --format='commit %H' >>"$out/device.csv" 2>/dev/null

if [[ $wheel ]]; then
    # Python finds the package in the folder at hand: from here on that is the wheel's, not the source tree's.
    "$python" -m zipfile -e "$wheel" "$parts/site" && cd "$parts/site" || { echo "on_gpu.sh: no wheel $wheel"; exit 1; }
    loads='from kr_fast.backends import native; raise SystemExit(native.missing("cuda"))'
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    "$python" -c "$loads" || { echo "on_gpu.sh: $wheel does not run here"; exit 1; }
else
    step build 180 "$python" setup.py build_ext --inplace
fi
step info 30 "$python" -m kr_fast info
# What most depends on this first, so that a lease cut short still has it. Tests compile many Triton kernels: by several
# processes, but for those that fill the memory.
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
tests=("$python" -m pytest -q -p no:cacheprovider -m gpu)
step tests_loss 150 "${tests[@]}" "${parallel[@]}" "$root/tests/ops" -k "distillation and not more_than"
bench distillation_loss 120 "$root/bench/distillation/bench_distillation_loss.py"
bench residual_block 60 "$root/bench/batched/bench_model_residual_block.py"
bench conv2d 60 "$root/bench/batched/bench_model_conv2d.py"
bench training 60 "$root"/bench/batched/bench_model_{conv2d_backward,batch_norm,sgd}.py
step tests_other 120 "${tests[@]}" "${parallel[@]}" "$root/tests" -k "not distillation and not more_than"
for network in resnet20 wrn-28-2 airbench resnet18; do
    bench "model_array_$network" 60 "$root/bench/ensemble/bench_model_array_gpu.py" -k "$network"
done
bench membership 60 "$root"/bench/membership/bench_{lira,membership_signals}.py
mapfile -t others < <(grep -lr '"cuda"' --include='bench_*.py' "$root/bench" | grep -vE 'distillation_loss.py|_block.py|_conv2d.py|_array_gpu.py')
bench others 60 "${others[@]}" -k "not cpu"
# Accesses out of bounds, uninitialised reads and races in shared memory, by a case of each test of a CUDA kernel. Torch's
# own cache of memory would hide the first. Triton's kernels are left out: the tool also slows their compilation.
checked=("$root"/tests/ops/distillation/test_distillation_loss{,_topk}.py
    "$root"/tests/ops/membership/test_{lira,membership_signals,rmia}.py "$root/tests/ops/nn/test_group_norm_silu.py"
    "$root/tests/ops/batched/test_model_residual_block.py"
    "$root"/tests/ops/sampling/test_{pack_uint8,philox_normal,solver_step,solver_step_at}.py)
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer_$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "${tests[@]}" --one-case "${checked[@]}" -k "cuda-gpu and not more_than"
    done
else
    echo "== sanitizer: no compute-sanitizer on PATH, left out" | tee -a "$out/log.txt"
fi
step tests_large 60 "${tests[@]}" "$root/tests" -k more_than
nvidia-smi --query-gpu=$query --format=csv,noheader >>"$out/device.csv"
rm -rf "$parts"
exit "$failed"
