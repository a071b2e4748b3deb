// One product of a tile of 16 rows with a panel, some number of times: bench/arm/count.sh counts its instructions.
//
//   count ISA(neon|i8mm) FORMAT(qd_format) WIDTH COLS REPEATS WIDE(0|1)
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.hpp"

int main(int n, char** words) {
  if (n != 7) return 2;
  const Kernels* kernels = std::strcmp(words[1], "i8mm") ? neon_kernels() : i8mm_kernels();
  const int format = std::atoi(words[2]), width = std::atoi(words[3]), repeats = std::atoi(words[5]);
  const int64_t cols = std::atoll(words[4]);
  std::vector<uint8_t> tile(size_t(tile_bytes(format, cols)) + 8192), wide(size_t(groups_of(cols) * kMostWideGroup));
  std::vector<uint32_t> panel(size_t(panel_units(panel_kind(format, false), cols) * width) + 64);
  std::vector<float> out(size_t(16 * width));
  for (int i = 0; i < repeats; ++i) {
    if (std::atoi(words[6])) kernels->tile_wide(format, false, wide.data(), cols, panel.data(), out.data(), 16);
    else kernels->tile(format, false, tile.data(), cols, panel.data(), width, out.data(), 16);
  }
  return out[0] != 0.0f;
}
