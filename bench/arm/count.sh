#!/usr/bin/env bash
# Instructions a weight of the products on 64-bit ARM, as qemu executes them one by one: ours, and llama.cpp's.
#
#   bench/arm/count.sh [LLAMA]      after tools/arm.sh; LLAMA: a folder of llama.cpp's source
#
# A product of 16 rows of 4096 columns is done once and twice; the difference is what one takes, all loops and stores included.
# Instructions are no time: what is counted is work that a core cannot leave out, not how many it does at once.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=$PWD/build/arm work=$(mktemp -d) cols=4096
trap 'rm -rf "$work"' EXIT
CXX=aarch64-linux-gnu-g++
csrc=src/quadriga/kernels/cpu/csrc

executed() { QEMU_LD_PREFIX= qemu-aarch64-static -cpu max -singlestep -d exec,nochain "$@" 2>&1 | grep -c "^Trace" || true; }
line() {  # label, tokens, program and its words; {} is the number of repeats
  local one two label=$1 tokens=$2
  shift 2
  one=$(executed "${@//\{\}/1}") two=$(executed "${@//\{\}/2}")
  awk -v l="$label" -v n="$((two - one))" -v w="$((16 * cols * tokens))" 'BEGIN { printf "%-44s %.3f\n", l, n / w }'
}

$CXX -O2 -std=c++17 -static -I$csrc bench/arm/count.cpp "$here"/CMakeFiles/kernels_{neon,i8mm}.dir/$csrc/*.o -o "$work/count"
for isa in neon i8mm; do
  for format in 3:q4 2:q8; do
    for width in 1 4; do line "${format#*:}, $width token(s), $isa" "$width" "$work/count" $isa "${format%:*}" $width $cols '{}' 0; done
  done
done
[ $# = 0 ] && exit
ggml=$1/ggml
for isa in dotprod dotprod+i8mm; do
  $CXX -O3 -std=c++17 -march=armv8.2-a+$isa -w -I"$ggml/include" -I"$ggml/src" -I"$ggml/src/ggml-cpu" -DGGML_CPU_GENERIC_NONE \
    -static bench/arm/count_llama.cpp "$ggml/src/ggml-cpu/arch/arm/repack.cpp" -Wl,--unresolved-symbols=ignore-all -o "$work/llama"
  blocks=4x4
  [ $isa = dotprod ] || blocks=4x8
  for format in q4_0 q8_0; do
    line "llama.cpp ${format}_$blocks, 1 token, $isa" 1 "$work/llama" gemv_${format}_$blocks $cols '{}'
    line "llama.cpp ${format}_$blocks, 4 tokens, $isa" 4 "$work/llama" gemm_${format}_$blocks $cols '{}'
  done
done
