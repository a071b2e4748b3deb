// Products of packed matrices, compiled once for each instruction set beside kernels.cpp, whose table they become part of.
#include "kernels.hpp"

#include "bits.hpp"
#include "simd.hpp"

#include "matmul.inl"
#include "blocks.inl"
#include "tiles.inl"
#include "panels.inl"

Products QD_PRODUCTS() { return {kWidth, make_panel, fill_group, tile_any, widen_any, tile_wide_any}; }
