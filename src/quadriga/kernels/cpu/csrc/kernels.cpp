// Compiled once for each instruction set: QD_TABLE names the function that returns this build's table,
// QD_PRODUCTS the one of products.cpp.
#include "kernels.hpp"

#include "bits.hpp"
#include "each.hpp"
#include "simd.hpp"

#if QD_NEON
#include "matmul_neon.inl"
#include "blocks_neon.inl"
#else
#include "matmul.inl"
#include "blocks.inl"
#endif
#include "elementwise.inl"
#include "sampling.inl"
#include "attention.inl"
#include "recurrent.inl"
#include "decode.inl"
#include "pack_blocks.inl"
#include "pack.inl"
#include "search.inl"
#include "training.inl"

Products QD_PRODUCTS();

const Kernels* QD_TABLE() {
  static const Kernels table = {QD_PRODUCTS(), norm, activate,
                                add_scaled, scores, top_k, row_stats, sample, attend, merge, conv<true>, conv<false>, unit, delta_rule, state_space,
                                gated_norm, times_sigmoid, times_silu, write_kv, write_latent, pack_tile, pack_blocks, unpack_row,
                                dequantize, to_q8_0, search, hidden_any, hidden_back_any, sum_rows_any, softmax_any, softmax_back_any, cross_entropy_any,
                                peak_of, read_all};
  return &table;
}
