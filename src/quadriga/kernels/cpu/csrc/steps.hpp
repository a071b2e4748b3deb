// The coarse operations of a transformer, over all threads. Each reads and writes qd_batch::hidden, (N, D) float32.
#pragma once
#include "context.hpp"

void run_embed(qd_context&, const qd_embed&, const qd_batch&);
void run_qkv(qd_context&, const qd_attention&, const qd_batch&);       // norm, projection, clip, rotation, cache write
void run_attend(qd_context&, const qd_attention&, const qd_batch&);    // over the paged cache
void run_attention_out(qd_context&, const qd_attention&, const qd_batch&);  // projection, norm, residual
void run_ffn(qd_context&, const qd_ffn&, const qd_batch&);             // norm, router, experts or one network, residual
void run_head(qd_context&, const qd_head&, const qd_batch&);

// out (n, matrix.rows) = x (n, matrix.cols) times the matrix transposed; with `add`, out += instead.
void linear(qd_context&, const qd_matrix&, const float* x, int64_t x_stride, int64_t n, float* out, int64_t out_stride,
            bool add);
void norm_rows(qd_context&, const qd_norm&, const float* x, int64_t n, int64_t d, float* out);
// x normed into memory of the context, or x itself where the layer has no such norm.
const float* normed_or_as_is(qd_context&, const qd_norm&, const float* x, int64_t n, int64_t d);
