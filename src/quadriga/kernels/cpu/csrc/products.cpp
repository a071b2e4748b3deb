// Products of packed matrices, compiled once for each instruction set beside kernels.cpp, whose table they become part of.
#include <type_traits>

#include "kernels.hpp"

#include "bits.hpp"
#include "each.hpp"
#include "simd.hpp"

#if QD_NEON  // whose products come in grids of rows and tokens
#include "matmul_neon.inl"
#include "blocks_neon.inl"
#include "tiles_neon.inl"
#else
#include "matmul.inl"
#include "blocks.inl"
#include "groups.inl"
#include "tiles.inl"
#endif
#include "panels.inl"

Products QD_PRODUCTS() { return {kWidth, make_panel, fill_group, tile_any, widen_any, tile_wide_any}; }
