#!/usr/bin/env bash
# Every test that a GPU can run, in a few minutes; the report goes to tests/gpu/results/gpu.json. Needs a
# build of the package with the CUDA kernels, installed or in python/flash_dmattn/lib, and pytest, hypothesis
# and numpy.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" tests/gpu/run.py "$@"
