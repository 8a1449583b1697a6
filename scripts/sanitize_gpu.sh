#!/usr/bin/env bash
# compute-sanitizer over every kernel on tiny shapes: memcheck, racecheck, initcheck, synccheck, a line each.
# The exit code is 0 if all are clean. Needs a GPU and tests/gpu/smoke.cpp, built with the CUDA kernels:
#
#   cmake -S . -B build/cuda -DFLASH_DMATTN_CUDA=ON -DFLASH_DMATTN_BUILD_TESTING=ON
#   cmake --build build/cuda --target flash_dmattn_smoke
#   scripts/sanitize_gpu.sh [build/cuda/tests/gpu/flash_dmattn_smoke] [folder for the logs]
set -uo pipefail
cd "$(dirname "$0")/.."
program=${1:-build/cuda/tests/gpu/flash_dmattn_smoke}
logs=${2:-build/sanitize}
# A Highway library that was carried along with the Python package serves the program, too.
export LD_LIBRARY_PATH=$PWD/python/flash_dmattn/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

command -v compute-sanitizer >/dev/null || PATH=$PATH:/usr/local/cuda/bin
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; exit 1; }
[[ -x $program ]] || { echo "$program is missing: see the head of $0"; exit 1; }
mkdir -p "$logs"

declare -A options=(
  [memcheck]="--leak-check full --padding 64"
  [racecheck]="--racecheck-report all"
  [initcheck]=""
  [synccheck]=""
)
for tool in memcheck racecheck initcheck synccheck; do
  (
    start=$SECONDS
    # shellcheck disable=SC2086
    timeout 240 compute-sanitizer --tool "$tool" ${options[$tool]} --error-exitcode 9 --print-limit 20 \
      "$program" >"$logs/$tool.log" 2>&1
    code=$?
    summary=$(grep -E '(ERROR|RACECHECK|LEAK) SUMMARY' "$logs/$tool.log" | sed 's/^=* *//' | paste -sd ';')
    ran=$(grep -c '^smoke: all ran' "$logs/$tool.log")
    verdict=clean
    [[ $code -eq 0 && $ran -eq 1 ]] || verdict=FAILED
    echo "$tool: $verdict; exit code $code; ${summary:-no summary}; $((SECONDS - start)) s; $logs/$tool.log" \
      >"$logs/$tool.line"
  ) &
done
wait
cat "$logs"/{memcheck,racecheck,initcheck,synccheck}.line
! grep -q FAILED "$logs"/{memcheck,racecheck,initcheck,synccheck}.line
