#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in one command of at most ten minutes:
#
#   bench/gpu_check.sh [FOLDER]
#
# builds and installs the package into the current Python (no network needed), runs the tests marked gpu, Compute
# Sanitizer on small shapes, the benches of all ops and of whole steps.  Rows go to bench/results/<gpu>/*.jsonl; logs, a
# copy of the rows, their tables and a summary to FOLDER (default: gpu_check).  Every step runs whatever became of those
# before it, and has a time limit.  Exit code 1 if one failed.
#
#   PYTHON=python3.12  the interpreter        BUDGET_S=570  seconds for all steps        WORKERS=8  of pytest
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
BUDGET_S=${BUDGET_S:-570}
OUT=${1:-gpu_check}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export OMP_NUM_THREADS=1 FASTPRUNE_TEST_BACKENDS=${FASTPRUNE_TEST_BACKENDS:-eager,triton} PYTHONUNBUFFERED=1

"$PYTHON" - <<'PY' || exit 1
try:
    import torch
except ImportError:
    raise SystemExit("gpu_check: this Python has no torch; name another one: PYTHON=... bench/gpu_check.sh")
if not torch.cuda.is_available():
    raise SystemExit("gpu_check: PyTorch sees no GPU here; `make test` runs the same kernels in Triton's interpreter")
print("gpu_check:", torch.cuda.get_device_name(), "torch", torch.__version__)
PY

summary=$OUT/summary.md
printf '| step | result | seconds | last line |\n| --- | --- | ---: | --- |\n' > "$summary"
failed=0
# step NAME SECONDS COMMAND...: run within the limit and what is left of the budget, keep the log
step() {
  local name=$1 limit=$2 started=$SECONDS status result
  shift 2
  local left=$((BUDGET_S - SECONDS))
  if [ "$left" -lt 5 ]; then
    status=125
  else
    timeout -k 5 $((limit < left ? limit : left)) "$@" > "$OUT/$name.log" 2>&1
    status=$?
  fi
  case $status in
    0) result=passed ;;
    124 | 137) result='out of time' failed=1 ;;
    125) result='not run: no time left' failed=1 ;;
    127) result='not run: command missing' failed=1 ;;
    *) result="failed ($status)" failed=1 ;;
  esac
  local last
  last=$(grep -v '^ *$' "$OUT/$name.log" 2> /dev/null | tail -n 1 | cut -c1-160 | tr '|' '/')
  printf '| %s | %s | %s | %s |\n' "$name" "$result" "$((SECONDS - started))" "$last" | tee -a "$summary"
  return "$status"
}

step build 120 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
step doctor 30 "$PYTHON" -m fastprune doctor
if step tests 200 "$PYTHON" -m pytest -q -m gpu -n "${WORKERS:-8}" -p no:cacheprovider; then
  export FASTPRUNE_TESTED=1  # the benches need not run them again
  gate=
else
  gate=--no-gate  # their rows will say that they are unverified
fi

for tool in memcheck racecheck; do  # doctor runs every op forward and backward on small, ragged shapes
  sanitize=(compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m)
  step "$tool" 60 "${sanitize[@]}" fastprune doctor
  step "${tool}_split_sums" 60 "${sanitize[@]}" pytest -q -p no:cacheprovider tests/test_triton_kernels.py -k split_sums
done

RESNET50='256x64x112x112 256x256x56x56 256x128x28x28 256x512x28x28 256x1024x14x14 256x2048x7x7'
ENDS='16x128x32x32 64x256x112x112'  # where published Triton kernels lose to PyTorch
# shellcheck disable=SC2086
bench() { step "bench_$1" "$2" "$PYTHON" -m "bench.$3" --device cuda $gate "${@:4}"; }
# shellcheck disable=SC2086
bench batch_norm_act 60 ops.batch_norm_act --shapes $RESNET50 $ENDS --dtypes bfloat16
# shellcheck disable=SC2086
bench batch_norm_act_compile 90 ops.batch_norm_act --shapes $RESNET50 --dtypes bfloat16 --what relu --compile
for op in channel_gate filter_norm growing_sgd gram_penalty masked_conv2d; do bench "$op" 40 "ops.$op"; done
bench step 45 e2e.step
bench statistics 45 e2e.statistics
bench growing 60 e2e.growing

results=$("$PYTHON" -c 'from bench.harness import RESULTS, device_folder; print(RESULTS / device_folder("cuda"))')
if compgen -G "$results/*.jsonl" > /dev/null; then
  cp "$results"/*.jsonl "$OUT"
  for rows in "$results"/*.jsonl; do
    "$PYTHON" -m bench.table "$rows"
    echo
  done > "$OUT/tables.md"
fi
echo "gpu_check: $SECONDS s; summary, logs and tables are in $OUT"
exit $failed
