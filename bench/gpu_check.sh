#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in one command of at most ten minutes:
#
#   bench/gpu_check.sh [FOLDER]
#
# builds and installs the package into the current Python (no network needed), runs the tests marked gpu, Compute
# Sanitizer on small shapes, the benches of all ops and of whole steps, what is wanted most first.  Rows go to
# bench/results/<gpu>/*.jsonl; logs, a copy of the rows, their tables, docs/results/gpu.md as it would be and a summary
# to FOLDER (default: gpu_check).  Every step runs whatever became of those before it, and has a time limit.  Exit code 1
# if one failed.  Goals that are missed are said, and no failure.
#
#   PYTHON=python3.12  the interpreter        BUDGET_S=570  seconds for all steps        WORKERS=12  of pytest
#   COMMIT=...         what the rows call the commit where there is no git
#   ONLY='build|compile'    only steps whose names match; benches whose tests do not run then run them themselves
#   GPU_CHECK_DEVICE=cpu    the same steps on a CPU, tiny: to see that the script works, not to believe
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
BUDGET_S=${BUDGET_S:-570}
DEVICE=${GPU_CHECK_DEVICE:-cuda}
OUT=${1:-gpu_check}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

"$PYTHON" - "$DEVICE" <<'PY' || exit 1
import sys
try:
    import torch
except ImportError:
    raise SystemExit("gpu_check: this Python has no torch; name another one: PYTHON=... bench/gpu_check.sh")
if sys.argv[1] not in ("cuda", "cpu"):
    raise SystemExit(f"gpu_check: GPU_CHECK_DEVICE must be cuda or cpu, got {sys.argv[1]!r}")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    raise SystemExit("gpu_check: PyTorch sees no GPU here; `make test` runs the same kernels in Triton's interpreter")
print("gpu_check:", torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "CPU", "torch", torch.__version__)
PY

summary=$OUT/summary.md
printf '| step | result | seconds | last line |\n| --- | --- | ---: | --- |\n' > "$summary"
# step NAME SECONDS COMMAND...: run within the limit and what is left of the budget, keep the log
step() {
  local name=$1 limit=$2 started=$SECONDS status result
  shift 2
  [[ $name =~ ${ONLY:-.} ]] || return 0
  local left=$((BUDGET_S - SECONDS))
  if [ "$left" -lt 5 ]; then
    status=125
  else
    timeout -k 5 $((limit < left ? limit : left)) "$@" > "$OUT/$name.log" 2>&1
    status=$?
  fi
  case $status in
    0) result=passed ;;
    124 | 137) result='out of time' ;;
    125) result='not run: no time left' ;;
    127) result='not run: command missing' ;;
    *) result="failed ($status)" ;;
  esac
  local last
  last=$(grep -v '^ *$' "$OUT/$name.log" 2> /dev/null | tail -n 1 | cut -c1-160 | tr '|' '/')
  printf '| %s | %s | %s | %s |\n' "$name" "$result" "$((SECONDS - started))" "$last" | tee -a "$summary"
  return "$status"
}

if [ "$DEVICE" = cuda ]; then
  export FASTPRUNE_TEST_BACKENDS=${FASTPRUNE_TEST_BACKENDS:-eager,triton,cuda}
  norms=('256x64x112x112' '256x64x56x56' '256x256x56x56' '256x128x28x28' '256x512x28x28' '256x256x14x14' '256x1024x14x14'
    '256x512x7x7' '256x2048x7x7' '16x128x32x32' '64x256x112x112') # ResNet-50, and where published kernels lose
  rows=()
  nets=(resnet50 resnet56)
  quick=() quick_norm=(--sample-ms 1 --per-channel) quick_net=() quick_step=() quick_steps=() quick_growing=()
  first=(tests/test_batch_norm_act.py) others=()
  for op in channel_gate filter_sums gate_sums gram_penalty growing_sgd masked_conv2d scale_penalty; do
    others+=("tests/test_$op.py")
  done
  convs=(--dtypes bfloat16 --dead 0.75)
else
  export FASTPRUNE_TEST_BACKENDS=${FASTPRUNE_TEST_BACKENDS:-eager,triton}
  norms=('2x4x4x4')
  rows=(--out "$OUT/rows" --rounds 7)
  nets=(resnet20)
  quick=(--quick) quick_norm=(--sample-ms 0.1) quick_net=(--batch 2 --size 8 --interval 1 --impls eager fused tpp)
  quick_step=(--nets resnet56 --batch 2 --allocator default --no-resident)
  quick_steps=(--nets resnet20 --batch 2 --allocator default) quick_growing=(--impls fused --interval 1)
  first=(tests/test_gate_sums.py) others=(tests/test_gate_sums.py)
  convs=(--shapes 2x4x4x4 --dtypes bfloat16 --dead 0.75 --sample-ms 0.1)
fi

if [ "$DEVICE" = cuda ]; then
  # all kernels or a reason in the log; then what there is without them, of which no test may ask more
  install=("$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation -e .)
  if ! step build 180 env FASTPRUNE_EXT=cuda "${install[@]}"; then
    export FASTPRUNE_TEST_BACKENDS=eager,triton
    if ! step build_without_cuda 90 env FASTPRUNE_EXT=cpu "${install[@]}"; then
      export PYTEST_ADDOPTS='-W ignore:fastprune:UserWarning' # of what could not be built
      step build_without_kernels 60 env FASTPRUNE_EXT=none "${install[@]}"
    fi
  fi
fi
step doctor 30 "$PYTHON" -m fastprune doctor

tested() { # NAME SECONDS TESTS...: whether the benches that follow are of tested kernels
  unset FASTPRUNE_TESTED
  gate=()
  [[ $1 =~ ${ONLY:-.} ]] || return 0
  if step "$1" "$2" "$PYTHON" -m pytest -q -m gpu -n "${WORKERS:-12}" -p no:cacheprovider "${@:3}"; then
    export FASTPRUNE_TESTED=1 # they need not run them again
  else
    gate=(--no-gate) # their rows will say that they are unverified
  fi
}
bench() { step "bench_$1" "$2" "$PYTHON" -m "bench.$3" --device "$DEVICE" "${gate[@]}" "${rows[@]}" "${@:4}"; }
norm() { bench "$1" "$2" ops.batch_norm_act --shapes "${norms[@]}" --dtypes bfloat16 "${quick_norm[@]}" "${@:3}"; }

if [ "$DEVICE" = cuda ]; then # beside the tests, a process per shape: to compile in the bench takes minutes
  compile='printf "%s\n" "$@" | TORCHINDUCTOR_COMPILE_THREADS=1 xargs -P "$#" -I{} "$0" -m bench.ops.batch_norm_act \
    --device cuda --shapes {} --dtypes bfloat16 --what relu --per-channel --compile --sample-ms 0 --no-gate --no-write'
  step compile_norms 120 bash -c "$compile" "$PYTHON" "${norms[@]}" &
fi
tested tests_batch_norm_act 120 "${first[@]}"
wait
norm batch_norm_act 100 --what relu
tested tests_ops 120 "${others[@]}"
for net in "${nets[@]}"; do bench "methods_$net" 120 e2e.methods --nets "$net" --amp "${quick_net[@]}"; done
if [ "$DEVICE" = cuda ]; then
  norm batch_norm_act_compile 120 --what relu --compile
  step tests_rest 100 "$PYTHON" -m pytest -q -m gpu -n "${WORKERS:-12}" -p no:cacheprovider tests \
    "${first[@]/#/--ignore=}" "${others[@]/#/--ignore=}"
  # without the allocator's cache every tensor has bounds of its own; both at once, nothing is timed here
  # a test takes seconds there: a few of every way through the norms' kernels
  few=()
  for case in '(4, 3, 24, 40)-nchw' '(9, 40, 2, 2)-nhwc'; do few+=("tests/test_slab_kernels.py::test_shapes[$case]"); done
  for case in '(2,3,7,7)-nchw' '(37,16,7,7)-nhwc' '(2,16,32,32)-nchw' '(2,3,56,56)-nhwc'; do
    for backend in ${FASTPRUNE_TEST_BACKENDS//,/ }; do
      if [ "$backend" != eager ]; then few+=("tests/test_batch_norm_act.py::test_every_shape[$case-$backend]"); fi
    done
  done
  if [[ $FASTPRUNE_TEST_BACKENDS == *cuda* ]]; then
    for way in 'wide cluster-ragged-nchw' 'cluster-vectors-nhwc' 'three launches-large planes-nchw'; do
      few+=("tests/test_cuda_kernels.py::test_every_way[$way]")
    done
  fi
  sanitize=("$PYTHON" -m pytest -q -p no:cacheprovider "${few[@]}")
  for tool in memcheck racecheck; do
    checker=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool")
    # PyTorch asks the driver for functions that it need not have; errors of our launches are exceptions
    if [ "$tool" = memcheck ]; then checker+=(--report-api-errors no); fi
    checker+=(--error-exitcode 9)
    step "$tool" 60 "${checker[@]}" "$PYTHON" -m fastprune doctor &
    step "${tool}_tests" 75 "${checker[@]}" "${sanitize[@]}" &
  done
  wait
  bench methods_graph 60 e2e.methods --nets resnet56 --layouts nhwc --amp \
    --impls eager eager+graph fused+graph greg-1+graph tpp+graph taylor-gate+graph
fi
bench channel_gate 30 ops.channel_gate --shapes "${norms[@]}" --dtypes bfloat16
for op in filter_norm growing_sgd gram_penalty; do bench "$op" 30 "ops.$op" "${quick[@]}"; done
bench masked_conv2d 40 ops.masked_conv2d "${convs[@]}"
bench statistics 40 e2e.statistics "${quick_steps[@]}" --page "$OUT/statistics.md"
bench growing 50 e2e.growing "${quick_steps[@]}" "${quick_growing[@]}" --page "$OUT/growing.md"
bench step 40 e2e.step "${quick_step[@]}"
norm batch_norm_act_others 60 --what add bn eval
if [ "$DEVICE" = cuda ]; then
  for net in resnet56 resnet50; do # half a minute and more for each network that is compiled
    bench "methods_compile_$net" 150 e2e.methods --nets "$net" --layouts nhwc --amp \
      --impls eager torch.compile greg-1+compile tpp+compile rni+compile
  done
fi

results=$OUT/rows
if [ "$DEVICE" = cuda ]; then
  results=$("$PYTHON" -c 'from bench.harness import RESULTS, device_folder; print(RESULTS / device_folder("cuda"))')
fi
if compgen -G "$results/*.jsonl" > /dev/null; then
  cp "$results"/*.jsonl "$OUT"
  for rows in "$results"/*.jsonl; do
    "$PYTHON" -m bench.table "$rows"
    echo
  done > "$OUT/tables.md"
  "$PYTHON" -m bench.gpu_page --page "$OUT/gpu.md"
  { echo; "$PYTHON" -m bench.gpu_page --summary "$results"/*.jsonl; } | tee -a "$summary"
fi
echo "gpu_check: $SECONDS s; summary, logs and tables are in $OUT"
! grep -q -E '^\| [a-z0-9_]+ \| (failed|out of time|not run)' "$summary"
