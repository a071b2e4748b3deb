// How packed matrices, activation panels and KV blocks lie in memory. Everything is 64-byte lines.
//
// A matrix is tiles of 16 rows; lane r of every line belongs to row r, so one line times one broadcast activation is one
// instruction. Columns beyond the matrix are zeros.
//
//   f32    per column        16 x f32
//   bf16   per 2 columns     16 x (bf16, bf16)
//   q8     per 64 columns    2 x 16 f16 scales, then 2 x 8 lines of 16 x (4 x u8),  w = d (u - 128)
//   q4     per 64 columns    2 x 16 f16 scales, then 2 x 4 lines,                   w = d (n - 8)
//   q4m    per 64 columns    2 x 16 f16 scales, 2 x 16 f16 minima, then 2 x 4 lines, w = d n + m
//   mx4    as q4, with codes of E2M1 for numbers,                                   w = d kE2M1[n]
//   iq4nl  as q4, with codes of uneven numbers,                                     w = d kUneven[n]
//   q5     per 64 columns    2 x 16 f16 scales, then 2 x qqqqb,                      w = d (n - 16)
//   q5m    per 64 columns    2 x 16 f16 scales, 2 x 16 f16 minima, then 2 x qqqqb,  w = d n + m
//
// Of GGUF's blocks of 256 columns d (and dmin) come first, 16 x f16 each, in one line; then 16 x i8 (q2k: u8) for every run of
// 32 or 16 columns, a scale s, and as many minima m; then eight groups of 32 columns: lines of the lowest four bits (`q`
// below), of two bits (`c`) and of one bit (`b`) of their numbers.
//
//   q4k    8 s, 8 m, 8 x qqqq      w = d s n - dmin m            q6k    16 s, 8 x qqqqcc   w = d s (n - 32)
//   q5k    8 s, 8 m, 8 x qqqqb     w = d s n - dmin m            q3k    16 s, 8 x ccb      w = d s (n - 4)
//   q2k    16 (s | m << 4), 8 x cc w = d s n - dmin m            iq4xs  8 s, 8 x qqqq      w = d s kUneven[n]
//
// A line of nibbles holds columns 8l..8l+3 in the low halves and 8l+4..8l+7 in the high ones; a line of two bits holds
// columns 16l + 4i.. in its i-th pairs, a line of one bit columns 4i.. in its i-th bits.
//
// A panel is the activations of `width` tokens in 4-byte units, unit u of token t at u * width + t:
//   f32    unit = one column            bf16   unit = two columns
//   int8   per 32 columns 12 units: eight of 4 x i8, the scale, -128 * sum (the zero point of unsigned weights),
//          scale * sum (what a minimum is multiplied by), and -128 * the sum of the first 16
//   int16  the same with 19 units: x = scale * (128 high + low), eight units of high bytes, eight of low ones
#pragma once
#include <cstddef>
#include <cstdint>

#include "quadriga.h"

enum PanelKind { kPanelF32 = 0, kPanelBf16 = 1, kPanelInt8 = 2, kPanelInt16 = 3 };

// Twice the number of each 4-bit code, sign, two bits of exponent, one of mantissa.
constexpr int8_t kE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
// The sixteen numbers of IQ4_NL and IQ4_XS (kvalues_iq4nl of ggml-common.h).
constexpr int8_t kUneven[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Codes of four bits: their numbers, and what makes all of them bytes above 0.
struct E2M1 {
  static constexpr const int8_t* numbers = kE2M1;
  static constexpr int zero = 16;
};
struct Uneven {
  static constexpr const int8_t* numbers = kUneven;
  static constexpr int zero = 128;
};

constexpr int kTile = 16;            // rows of a tile
constexpr int kMostWideGroup = 12 * 64;  // of wide_group_bytes

// What a matrix of this format is multiplied with; `int16`: 15 bits of an activation instead of 8.
inline PanelKind panel_kind(int format, bool int16) {
  return format == QD_FORMAT_FLOAT32 ? kPanelF32 : format == QD_FORMAT_BFLOAT16 ? kPanelBf16 : int16 ? kPanelInt16 : kPanelInt8;
}

inline bool is_integer(PanelKind kind) { return kind >= kPanelInt8; }
constexpr int group_units(int planes) { return 8 * planes + 4; }  // units of one integer group and token
inline int planes_of(PanelKind kind) { return kind == kPanelInt16 ? 2 : 1; }

inline int64_t groups_of(int64_t cols) { return (cols + 63) / 64 * 2; }

inline int64_t blocks_of(int64_t cols) { return (cols + 255) / 256; }

inline int64_t tile_bytes(int format, int64_t cols) {
  switch (format) {
    case QD_FORMAT_FLOAT32: return cols * 64;
    case QD_FORMAT_BFLOAT16: return (cols + 1) / 2 * 64;
    case QD_FORMAT_Q8: return groups_of(cols) / 2 * 1088;
    case QD_FORMAT_Q4:
    case QD_FORMAT_MX4:
    case QD_FORMAT_IQ4NL: return groups_of(cols) / 2 * 576;
    case QD_FORMAT_Q4M: return groups_of(cols) / 2 * 640;
    case QD_FORMAT_Q5: return groups_of(cols) / 2 * 704;
    case QD_FORMAT_Q5M: return groups_of(cols) / 2 * 768;
    case QD_FORMAT_Q2K: return blocks_of(cols) * 64 * 21;
    case QD_FORMAT_Q3K: return blocks_of(cols) * 64 * 29;
    case QD_FORMAT_Q4K: return blocks_of(cols) * 64 * 37;
    case QD_FORMAT_Q5K: return blocks_of(cols) * 64 * 45;
    case QD_FORMAT_Q6K: return blocks_of(cols) * 64 * 53;
    default: return blocks_of(cols) * 64 * 35;  // iq4xs
  }
}

// An unpacked group: 8 lines of bytes, and a line of f32 for every scale and minimum. 0: such tiles are multiplied as they are,
// which for plain nibbles was quicker than unpacking them once for all panels (AVX-512: 13.8 and 16 us a row of 1024 x 2048).
inline int wide_group_bytes(int format) {
  switch (format) {
    case QD_FORMAT_IQ4NL:
    case QD_FORMAT_Q5:
    case QD_FORMAT_IQ4XS: return 9 * 64;
    case QD_FORMAT_Q5M:
    case QD_FORMAT_Q5K:
    case QD_FORMAT_Q6K:
    case QD_FORMAT_Q3K: return 10 * 64;
    case QD_FORMAT_Q2K: return 12 * 64;
    default: return 0;
  }
}

// The packed format that a qd_source of blocks is copied into, or -1: it is one of numbers.
inline int source_format(int source) {
  switch (source) {
    case QD_SOURCE_Q8_0: return QD_FORMAT_Q8;
    case QD_SOURCE_Q4_0: return QD_FORMAT_Q4;
    case QD_SOURCE_Q4_1: return QD_FORMAT_Q4M;
    case QD_SOURCE_MX4: return QD_FORMAT_MX4;
    case QD_SOURCE_IQ4_NL: return QD_FORMAT_IQ4NL;
    case QD_SOURCE_Q5_0: return QD_FORMAT_Q5;
    case QD_SOURCE_Q5_1: return QD_FORMAT_Q5M;
    default: return -1;
  }
}

// The packed format that holds the blocks of a qd_stored of 256 numbers as they are, or -1.
inline int block_format(int stored) {
  switch (stored) {
    case QD_STORED_Q2_K: return QD_FORMAT_Q2K;
    case QD_STORED_Q3_K: return QD_FORMAT_Q3K;
    case QD_STORED_Q4_K: return QD_FORMAT_Q4K;
    case QD_STORED_Q5_K: return QD_FORMAT_Q5K;
    case QD_STORED_Q6_K: return QD_FORMAT_Q6K;
    case QD_STORED_IQ4_XS: return QD_FORMAT_IQ4XS;
    default: return -1;
  }
}

// Blocks of GGUF files: how many numbers, in how many bytes.
struct BlockShape {
  int count, bytes;
};
inline constexpr BlockShape kBlockShapes[] = {  // by qd_stored
    {32, 18},  {32, 20},   {32, 22},  {32, 24}, {32, 34}, {256, 84}, {256, 110}, {256, 144}, {256, 176}, {256, 210}, {256, 292}, {32, 18},
    {256, 136}, {256, 54}, {256, 66}, {32, 17}, {64, 36}, {256, 50}, {256, 56},  {256, 66},  {256, 74},  {256, 82},  {256, 98},  {256, 110}};
static_assert(sizeof(kBlockShapes) / sizeof(BlockShape) == QD_STORED_IQ3_S + 1, "a shape for each of qd_stored");
constexpr BlockShape block_shape(int stored) { return kBlockShapes[stored]; }

inline int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }

inline int64_t panel_units(PanelKind kind, int64_t cols) {  // of one token
  return kind == kPanelF32 ? cols : kind == kPanelBf16 ? (cols + 1) / 2 : groups_of(cols) * group_units(planes_of(kind));
}

inline int round_up_16(int n) { return (n + 15) / 16 * 16; }

// One head of one KV block: keys as a tile (lane = key), values by dimension (lane = dimension), scales of 8-bit ones.
inline int64_t key_bytes(int kv, int d) { return kv == QD_KV_FORMAT_FLOAT32 ? 64 * int64_t(d) : kv == QD_KV_FORMAT_BFLOAT16 ? 32 * int64_t(d) : 16 * int64_t(d); }
inline int64_t value_bytes(int kv, int d) {
  const int64_t padded = round_up_16(d);
  return kv == QD_KV_FORMAT_FLOAT32 ? 64 * padded : kv == QD_KV_FORMAT_BFLOAT16 ? 32 * padded : 16 * padded;
}
inline int64_t kv_bytes(int kv, int d) {
  return (key_bytes(kv, d) + value_bytes(kv, d) + (kv == QD_KV_FORMAT_Q8 ? 128 : 0) + 63) / 64 * 64;
}

// A block of latents is their keys' tile alone; of 8-bit ones the scales follow, of the latents, then of what turns.
inline int64_t latent_bytes(int kv, int d) { return key_bytes(kv, d) + (kv == QD_KV_FORMAT_Q8 ? 128 : 0); }
