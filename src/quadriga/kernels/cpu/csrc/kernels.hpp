// What one thread computes: the inner loops, compiled once for each instruction set and reached through this table.
#pragma once
#include "layout.hpp"

constexpr int kMaxWidth = 12;  // the widest panel of any instruction set

// Attention of some query rows of one key/value head to one chunk of QD_KV_CHUNK keys: unnormalised partial results.
struct AttendChunk {
  const uint8_t* kv;        // this layer's and head's part of block 0
  int64_t block_stride;     // bytes from one block to the next
  const int32_t* table;     // the sequence's blocks
  int32_t chunk;            // keys [chunk * QD_KV_CHUNK, ...)
  int32_t kv_format, head_dim, n_rows;
  const float* const* q;    // n_rows pointers to head_dim floats
  const int32_t* positions; // of each row
  const float* slopes;      // of each row, or NULL
  float scale, soft_cap;
  int32_t window;           // keys a row sees, its own included; 0: all
  int32_t rank;             // keys are latents, of which the first numbers are the value; 0: values of head_dim numbers
  float *max, *sum;         // (n_rows,)
  float* out;               // (n_rows, round_up_16(head_dim or rank))
  uint32_t* scratch;        // attend_scratch(n_rows, head_dim) units
};

inline int64_t attend_scratch(int n_rows, int d) {
  // queries as panel units, scores, probabilities and scores of a latent's second part, expanded keys of two tiles and
  // values of a chunk
  return int64_t(n_rows) * (d + 3 * QD_KV_CHUNK) + 2 * 16 * d + int64_t(QD_KV_CHUNK) * round_up_16(d);
}

constexpr int kSampleBlock = 256;  // tokens whose weights are summed together, counted from token 0

// Weights in whole blocks, their logarithms, two selections of them that are written 16 at a time; three numbers a block;
// one for every token so far that repetitions are looked for in.
inline int64_t sample_scratch(int64_t v, int64_t n_history) {
  const int64_t blocks = (v + kSampleBlock - 1) / kSampleBlock;
  return 4 * (blocks * kSampleBlock + 16) + 4 * (blocks + 16) + n_history;
}

// Some channels of a convolution over one sequence's tokens.
struct ConvPart {
  const float* rows;      // of a short convolution b, c, x (n, 3 W), otherwise what is convolved, `stride` numbers a row
  int64_t n, width;       // W
  int64_t stride;
  int64_t first, end; // channels
  const float* taps;  // (n_taps, W)
  const float* bias;  // (W,) or NULL; of none but silu's
  int n_taps;
  const float* before;  // (n_taps - 1, W), or NULL: zeros
  float* after;         // alike; it may be `before`
  float* out;           // (n, W)
};

// Some columns of one head's state under the gated delta rule, over one sequence's tokens.
struct DeltaPart {
  const float *q, *k, *v;  // of the first token; `stride` numbers to the next
  int64_t stride;
  const float *decay, *beta;  // likewise, `gate_stride`
  int64_t gate_stride, n;
  int k_dim, v_dim, columns;  // columns <= kDeltaColumns
  const float* before;        // (k_dim, v_dim) from the first of these columns on, or NULL: zeros
  float* after;               // alike; it may be `before`
  float* out;                 // `out_stride` numbers from token to token
  int64_t out_stride;
  float* room;                // 16 k_dim numbers for every 16 columns that are begun
};

constexpr int kDeltaColumns = 32;  // their state (16 KB at k_dim 128) stays in the nearest cache from token to token

// Some columns of one head's state of a Mamba-2 layer, over one sequence's tokens.
struct StatePart {
  const float *x, *b, *c;  // of the first token; `stride` numbers to the next
  int64_t stride;
  const float *decay, *step;  // likewise, `gate_stride`
  float skip;
  int64_t gate_stride, n;
  int state_dim, head_dim, columns;  // columns <= kStateColumns
  const float* before;               // (state_dim, head_dim) from the first of these columns on, or NULL: zeros
  float* after;                      // alike; it may be `before`
  float* out;                        // `out_stride` numbers from token to token
  int64_t out_stride;
};

constexpr int kStateColumns = 64;
constexpr int kMostTaps = 16;
constexpr int kPeakLines = 24;  // 64-byte lines of weights an iteration of `peak` multiplies

struct Products {  // products.cpp
  int max_width;  // tokens of a panel

  // x: `width` row pointers of `cols` floats -> a panel (panel_units(kind, cols) * width units)
  void (*make_panel)(PanelKind, const float* const* x, int width, int64_t cols, uint32_t* panel);
  // One integer group, or 16 bf16 units, or 32 f32 units, of a panel from 32 columns of each token: x (width, 32).
  void (*fill_group)(PanelKind, const float* x, int width, int64_t group, uint32_t* panel, int64_t cols);
  // out[t * out_stride + r] = sum_c tile[r, c] * panel[t, c] for the 16 rows of a tile
  void (*tile)(int format, bool int16, const uint8_t* tile, int64_t cols, const uint32_t* panel, int width, float* out,
               int64_t out_stride);
  // Unpack a tile into bytes and float32 scales (wide_group_bytes); tile_wide, of a panel of max_width, gives the same bits
  // as tile.
  void (*widen)(int format, const uint8_t* tile, int64_t cols, uint8_t* wide);
  void (*tile_wide)(int format, bool int16, const uint8_t* wide, int64_t cols, const uint32_t* panel, float* out,
                    int64_t out_stride);
};

struct Kernels : Products {
  void (*norm)(const qd_norm&, const float* x, int64_t d, float* out);
  // hidden[i] = activation(gate[i]) * up[i], or activation(up[i]) without a gate; n a multiple of 16
  void (*activate)(int activation, const float* gate, const float* up, int64_t n, float* hidden);
  void (*add_scaled)(float* sum, const float* x, float scale, int64_t n);  // sum += scale * x; n a multiple of 16
  // logits -> softmax or sigmoid (a qd_score), in place
  void (*scores)(int kind, float* x, int64_t n);
  // ids of the k largest of n <= QD_MOST_EXPERTS numbers, the largest first, of equal ones the lower; x, padded to 16s,
  // is overwritten
  void (*top_k)(float* x, int64_t n, int k, int32_t* ids);
  void (*row_stats)(const float* x, int64_t n, int32_t* best, float* log_sum);
  // scratch: sample_scratch(v) floats
  void (*sample)(const qd_sampling&, int64_t v, float* scratch, qd_sampled* out);
  void (*attend)(const AttendChunk&);
  // (max, sum, out) of one row gets another chunk's; d padded to 16
  void (*merge)(float* max, float* sum, float* out, float max2, float sum2, const float* out2, int padded);
  void (*short_conv)(const ConvPart&);
  void (*silu_conv)(const ConvPart&);
  void (*unit)(float* x, int64_t d, float scale);  // x becomes scale x / sqrt(x x + 1e-6)
  void (*delta_rule)(const DeltaPart&);
  void (*state_space)(const StatePart&);
  void (*gated_norm)(const qd_norm&, const float* x, const float* gate, int64_t d, float* out);  // norm(x) silu(gate)
  void (*times_sigmoid)(float* x, const float* gate, int64_t n);
  void (*times_silu)(float* x, const float* gate, int64_t n);
  void (*write_kv)(int kv_format, int head_dim, const float* k, const float* v, int slot, uint8_t* block);
  void (*write_latent)(int kv_format, int rank, int head_dim, const float* k, int slot, uint8_t* block);

  int64_t (*pack)(int source, const void* in, int64_t row_bytes, int64_t rows, int64_t cols, int64_t tile, int format,
                  uint8_t* out, const float* importance);
  // One tile from blocks of 256 numbers, as they are; 1 + the first row whose scale is no number, or 0.
  int64_t (*pack_blocks)(int stored, const uint8_t* in, int64_t row_bytes, int n_rows, int64_t cols, uint8_t* out);
  void (*unpack_row)(int format, const uint8_t* packed, int64_t cols, int64_t row, float* out);
  void (*dequantize)(int stored, const uint8_t* blocks, int64_t n, const int8_t* codebook, float* out);
  bool (*to_q8_0)(int stored, const uint8_t* blocks, int64_t n, uint8_t* out);  // false: q8_0 does not hold them exactly
  void (*search)(const qd_search&);
  // Training (training.inl); dtype QD_FORMAT_FLOAT32 or QD_FORMAT_BFLOAT16, one row a call.
  void (*hidden)(int dtype, int activation, const void* gate, const void* up, float weight, int64_t f, void* hidden);
  float (*hidden_back)(int dtype, int activation, const void* gate, const void* up, float weight, int64_t f, void* dh,
                       void* hidden, void* du);
  void (*sum_rows)(int dtype, const void* rows, const int64_t* home, int64_t k, int64_t d, void* out);
  void (*masked_softmax)(int dtype, void* row, int64_t low, int64_t high, int64_t keys, float slope, float first_bias,
                         float* work);
  void (*softmax_back)(int dtype, const void* p, int64_t low, int64_t high, int64_t keys, void* dp);
  float (*cross_entropy)(int dtype, void* logits, int64_t target, int64_t v, float scale, bool gradient, float* work);

  double (*peak)(int format, int64_t iterations);
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();  // on x86-64
const Kernels* avx512_kernels();
const Kernels* neon_kernels();  // on 64-bit ARM
const Kernels* i8mm_kernels();
