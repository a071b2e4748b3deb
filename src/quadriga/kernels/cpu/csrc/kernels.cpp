// Compiled once for each instruction set: QD_TABLE names the function that returns this build's table.
#include "kernels.hpp"

#include "simd.hpp"

#include "matmul.inl"
#include "elementwise.inl"
#include "attention.inl"
#include "recurrent.inl"
#include "pack.inl"
#include "decode.inl"
#include "training.inl"

const Kernels* QD_TABLE() {
  static const Kernels table = {kWidth, make_panel, fill_group, tile_any, widen_any, tile_wide_any, norm, activate,
                                add_scaled, scores, top_k, row_stats, attend, merge, conv<true>, conv<false>, unit, delta_rule, gated_norm, times_sigmoid, write_kv, pack_tile, unpack_row,
                                dequantize, to_q8_0, hidden_any, hidden_back_any, sum_rows_any, softmax_any, softmax_back_any, cross_entropy_any,
                                peak_of, read_all};
  return &table;
}
