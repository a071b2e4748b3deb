#!/usr/bin/env bash
# A wheel (or the source distribution) in fresh environments: what they weigh, and the time until an answer.
#
#   tools/try_wheel.sh FILE [PYTHON...]      python3 where none is named
set -euo pipefail
file=$(realpath "$1")
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ $# -gt 0 ] || set -- python3
cd "$work"  # away from any source tree
for python in "$@"; do
  rm -rf env
  begin=$(date +%s.%N)
  "$python" -m venv env
  env/bin/pip install --quiet --disable-pip-version-check "$file"
  installed=$(date +%s.%N)
  answer=$(env/bin/quadriga generate "The old man" --model quadriga-nano --max-tokens 8)
  answered=$(date +%s.%N)
  [ -n "$answer" ]
  megabytes=$(du -s --block-size=1000000 env | cut -f1)
  awk -v python="$(env/bin/python --version)" -v mb="$megabytes" -v a="$begin" -v b="$installed" -v c="$answered" \
    'BEGIN { printf "%s: %d MB, installed in %.1f s, an answer after %.1f s more\n", python, mb, b - a, c - b }'
done
