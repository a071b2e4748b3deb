#!/usr/bin/env bash
# The day a GPU is there: kernels compiled, held to the truth, and timed. Under ten minutes; rows of CSV.
#
#   bash bench/gpu.sh [--dry] [OUT.csv]       --dry: interpreted on this machine's processor, at toy sizes, no times
set -euo pipefail
cd "$(dirname "$0")/.."
dry=()
if [ "${1:-}" = --dry ]; then
  dry=(--dry)
  export TRITON_INTERPRET=1
  shift
else
  nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader
fi
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}"
"${PYTHON:-python}" bench/gpu_day.py "${dry[@]}" "${1:-gpu.csv}"
