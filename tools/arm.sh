#!/usr/bin/env bash
# The kernels of 64-bit ARM on any machine: cross-compiled, and their tests run by qemu's processor and an ARM Python.
#
#   tools/arm.sh                   compile; the tests of operations, runners and sampling under qemu (hours)
#   tools/arm.sh quick             products in every format on every instruction set, without torch, in minutes
#   tools/arm.sh python ARGS...    the ARM Python alone, with what it needs to import quadriga and torch
#
# Debian's packages aarch64-linux-gnu-g++ (g++-aarch64-linux-gnu), qemu-user-static and cmake; apt and pip fetch the ARM Python and
# its packages into build/arm, once. QEMU_CPU=neoverse-n1 is a processor with dotprod only, cortex-a72 one without.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD/build/arm
export QEMU_CPU=${QEMU_CPU:-max,sve=off,sme=off} OMP_NUM_THREADS=1

fetch_python() {
  [ -f "$here/root/done" ] && return
  rm -rf "$here/root" "$here/apt"
  mkdir -p "$here"/apt/{lists/partial,archives/partial} "$here/root"
  : >"$here/apt/status"
  local options=(-o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Install-Recommends=false
                 -o Dir::State::lists="$here/apt/lists" -o Dir::State::status="$here/apt/status"
                 -o Dir::Cache::archives="$here/apt/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
  apt-get "${options[@]}" -qq update
  apt-get "${options[@]}" -qq install --yes --download-only python3 libstdc++6 libgomp1
  for package in "$here"/apt/archives/*.deb; do dpkg -x "$package" "$here/root"; done
  touch "$here/root/done"
}

# What tests import. torch is the last whose ARM build needs no CUDA: it is what kernels are compared with, no part of them.
fetch_packages() {
  [ -f "$here/packages/done" ] && return
  local tags=()
  for glibc in 17 27 28 31 34; do tags+=(--platform "manylinux_2_${glibc}_aarch64"); done
  local version
  version=$(ARM_python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  python3 -m pip install --quiet --target "$here/packages" --only-binary=:all: --python-version "$version" \
    "${tags[@]}" --platform manylinux2014_aarch64 torch==2.9.1 numpy ml_dtypes safetensors tokenizers tiktoken sentencepiece jinja2 \
    msgspec huggingface_hub typer rich prompt_toolkit llguidance prometheus-client pytest hypothesis gguf psutil transformers==4.57.6 peft
  touch "$here/packages/done"
}

ARM_python() {
  PYTHONPATH="$PWD/src:$here/packages" QUADRIGA_LIBRARY="$here/quadriga_cpu.so" \
    qemu-aarch64-static -L "$here/root" "$here/root/usr/bin/python3" "$@"
}

compile() {
  cmake -S . -B "$here" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ >/dev/null
  cmake --build "$here" -j "${JOBS:-2}" | grep -vE 'Built target|up to date' || true
  cmake --build "$here" >/dev/null
}

compile
fetch_python
fetch_packages
case "${1:-all}" in
  python) shift; ARM_python "$@" ;;
  quick) ARM_python -m pytest -p no:cacheprovider --noconftest tests/ops/test_instruction_sets.py ;;
  all) ARM_python -m pytest -p no:cacheprovider tests/ops tests/runners tests/engine/test_sampling_kernels.py ;;
  *) echo "tools/arm.sh [quick | python ARGS...]; got $1" >&2; exit 2 ;;
esac
