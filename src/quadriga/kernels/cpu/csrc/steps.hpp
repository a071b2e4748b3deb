// The coarse operations of a transformer, over all threads. Each reads and writes qd_batch::hidden, (N, D) float32.
#pragma once
#include "context.hpp"

void run_embed(qd_context&, const qd_embed&, const qd_batch&);
void run_qkv(qd_context&, const qd_attention&, const qd_batch&);       // norm, projection, clip, rotation, cache write
void run_latent_qkv(qd_context&, const qd_attention&, const qd_batch&);  // the same of latent attention, queries absorbed
void run_attend(qd_context&, const qd_attention&, const qd_batch&);    // over the paged cache
void run_attention_out(qd_context&, const qd_attention&, const qd_batch&);  // projection, norm, residual
void run_short_conv(qd_context&, const qd_short_conv&, const qd_batch&);    // a layer's first half as a whole
void run_delta_net(qd_context&, const qd_delta_net&, const qd_batch&);
void run_mamba2(qd_context&, const qd_mamba2&, const qd_batch&);
void run_latent_out(qd_context&, const qd_attention&, const qd_batch&);  // values of every head's latent, then the same
// `mixed` (N, wo.cols) projected, normed and added to the residual stream.
void add_projected(qd_context&, const qd_attention&, const qd_batch&, const float* mixed);
void run_ffn(qd_context&, const qd_ffn&, const qd_batch&);             // norm, router, experts or one network, residual
void run_head(qd_context&, const qd_head&, const qd_batch&);
void run_merge(qd_context&, const qd_merge&, const qd_batch&);           // the ranks' parts of a branch, norm, residual

// Where a branch's sum goes that other ranks have parts of, (N, D); NULL: it is this rank's alone, into hidden.
inline float* own_branch(const qd_batch& b, int64_t d) {
  return b.branches ? b.branches + int64_t(b.branch) * b.n_tokens * d : nullptr;
}

// out (n, matrix.rows) = x (n, matrix.cols) times the matrix transposed; with `add`, out += instead.
void linear(qd_context&, const qd_matrix&, const float* x, int64_t x_stride, int64_t n, float* out, int64_t out_stride,
            bool add);
// The same for a matrix a head, (H rows, cols) in all, rows a multiple of 16: head h of a row of x, (H, cols) at its
// strides, times its own rows, to head h of a row of out.
struct HeadStrides {
  int64_t row, head;
};
void head_linear(qd_context&, const qd_matrix&, int n_heads, const float* x, HeadStrides of_x, int64_t n, float* out,
                 HeadStrides of_out);
void norm_rows(qd_context&, const qd_norm&, const float* x, int64_t n, int64_t d, float* out);
// A branch's end: mixed times the matrix transposed, a bias and a norm if there are, all times scale, into the residual stream.
void add_branch(qd_context&, const qd_matrix&, const float* bias, const qd_norm& post_norm, float scale, const float* mixed,
                const qd_batch&);
// x normed into memory of the context, or x itself where the layer has no such norm.
const float* normed_or_as_is(qd_context&, const qd_norm&, const float* x, int64_t n, int64_t d);

// The blocks of a sequence in a layer.
inline const int32_t* block_table(const qd_attention& op, const qd_batch& b, int sequence) {
  return b.tables + op.cache_group * b.table_size + b.table_starts[sequence];
}
