/* The C interface of Quadriga's CPU kernels: plain structs and functions, bound by ctypes in ops/cpu.py.
 *
 * Shape letters as in ops/__init__.py: N packed tokens, D d_model, H heads, K key/value heads, d head_dim, F d_ff,
 * E experts, k experts a token, V vocabulary, R rows whose logits are wanted.
 *
 * Every struct is mirrored by a ctypes.Structure; qd_abi() returns a number that both sides check. */
#ifndef QUADRIGA_H
#define QUADRIGA_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QD_ABI 3
#define QD_BLOCK_TOKENS 16 /* tokens of one KV block */
#define QD_KV_CHUNK 256    /* keys whose softmax is taken together, counted from position 0: fixed, so that a result
                              does not depend on batch or threads */

enum qd_format { QD_F32 = 0, QD_BF16 = 1, QD_Q8 = 2, QD_Q4 = 3, QD_Q4M = 4 };
enum qd_source { QD_FROM_F32 = 0, QD_FROM_BF16 = 1, QD_FROM_F16 = 2, QD_FROM_Q8_0 = 3, QD_FROM_Q4_0 = 4, QD_FROM_Q4_1 = 5 };
enum qd_kv { QD_KV_F32 = 0, QD_KV_BF16 = 1, QD_KV_Q8 = 2 };
enum qd_norm_kind { QD_LAYER_NORM = 0, QD_RMS_NORM = 1 };
enum qd_activation { QD_SILU = 0, QD_GELU = 1, QD_GELU_TANH = 2, QD_RELU = 3 };
enum qd_aggregate { QD_WEIGHTED_SUM = 0, QD_VOTE = 1, QD_FUSE = 2 };
enum qd_isa { QD_PORTABLE = 0, QD_ISA_AVX2 = 1, QD_ISA_AVX512 = 2 };
enum qd_op_kind { QD_OP_EMBED = 0, QD_OP_QKV = 1, QD_OP_ATTEND = 2, QD_OP_ATTN_OUT = 3, QD_OP_FFN = 4, QD_OP_HEAD = 5 };

typedef struct qd_context qd_context; /* threads, instruction set, scratch memory; one forward pass at a time */
typedef struct qd_store qd_store;     /* experts that live on disk */

typedef struct {
  const uint8_t* data; /* packed, 64-byte aligned; NULL where there is no such matrix */
  int64_t rows, cols;
  int32_t format, reserved;
} qd_matrix;

typedef struct {
  const float* weight; /* (D,); NULL: no norm */
  int32_t kind;
  float eps;
} qd_norm;

typedef struct {
  qd_matrix table; /* (V, D) */
  float scale;
} qd_embed;

typedef struct {
  qd_norm norm, post_norm;
  qd_matrix wqkv, wo; /* (H d + 2 K d, D), (D, H d) */
  int32_t n_heads, n_kv_heads, head_dim, kv_format;
  float clip;                  /* 0: none */
  float score_scale, soft_cap; /* soft_cap 0: none */
  const float* inverse_frequencies; /* (d/2,) or NULL where positions are not rotary */
  const float* alibi_slopes;        /* (H,) or NULL */
  uint8_t* kv;                      /* this layer's blocks: n_blocks x K x qd_kv_bytes(format, d) */
} qd_attention;

typedef struct {
  qd_norm norm, post_norm;
  qd_matrix router;           /* (E, D) float32; data NULL: one dense network */
  const qd_matrix *gate, *up, *down; /* E each of (F, D), (F, D), (D, F); gate NULL: not gated. Formats may differ by
                                        expert, but an expert's gate and up take the same kind of activations */
  int32_t n_experts, top_k, activation, aggregate, layer, reserved;
  float normalize_p;          /* 0: none */
  float reserved_float;
  const float* fuse;          /* (E,) for QD_FUSE */
  int64_t* load;              /* (E,) running count of tokens per expert, or NULL */
  int32_t* ids;               /* (max N, k) chosen experts of the last pass, most probable first, or NULL */
  float* weights;             /* (max N, k) their weights, or NULL */
  float* logits;              /* (max N, E) the router's, before the softmax, or NULL */
  qd_store* store;            /* NULL: experts are in memory */
} qd_ffn;

typedef struct {
  qd_norm norm;
  qd_matrix weight; /* (V, D) */
  float logit_scale;
  int32_t reserved;
} qd_head;

/* What one forward pass is given. Sequence s owns tokens [starts[s], starts[s+1]), which end its positions. */
typedef struct {
  int32_t n_tokens, n_sequences, n_rows, reserved;
  const int32_t* tokens;       /* (N,) */
  const int32_t* positions;    /* (N,) */
  const int32_t* starts;       /* (S + 1,) */
  const int32_t* tables;       /* KV blocks of all sequences, end to end */
  const int32_t* table_starts; /* (S + 1,) */
  const int32_t* rows;         /* (R,) tokens whose logits are wanted */
  float* logits;               /* (R, V) */
  float* hidden;               /* (N, D) the residual stream; scratch of the caller */
} qd_batch;

typedef struct {
  int32_t kind, reserved;
  const void* op;
} qd_step;

int32_t qd_abi(void);
int32_t qd_best_isa(void);
qd_context* qd_create(int32_t n_threads, int32_t isa); /* NULL: this processor lacks the instruction set */
void qd_destroy(qd_context*);
void qd_set_fine(qd_context*, int32_t fine); /* 1: activations of q8, q4, q4m matrices in 15 bits instead of 8 */
int32_t qd_threads(const qd_context*);

int64_t qd_packed_bytes(int32_t format, int64_t rows, int64_t cols);
int64_t qd_kv_bytes(int32_t kv_format, int32_t head_dim); /* of one block of one head, keys and values */

/* Pack rows x cols numbers stored row-major as `source` (rows `row_bytes` apart) into out (qd_packed_bytes).
 * Block sources are copied bit by bit and need the matching format (q8_0 -> q8, q4_0 -> q4, q4_1 -> q4m).
 * importance: (cols,) weight of each column's squared error in the scale search, or NULL for one.
 * Returns 0, or 1 + index of the first row that holds a number the format cannot store. */
int64_t qd_pack(qd_context*, int32_t source, const void* in, int64_t row_bytes, int64_t rows, int64_t cols,
                int32_t format, uint8_t* out, const float* importance);
/* Rows [first, first + n) of a packed matrix as float32 (n, cols). */
void qd_unpack(qd_context*, int32_t format, const uint8_t* packed, int64_t rows, int64_t cols, int64_t first, int64_t n,
               float* out);

/* One op, or a whole captured step. Returns 0, 1 (unknown op) or 2 (out of memory). */
int32_t qd_run(qd_context*, const qd_step* steps, int32_t n_steps, const qd_batch* batch);
void qd_linear(qd_context*, const qd_matrix*, const float* x, int64_t n, float* out); /* (n, cols) -> (n, rows) */
void qd_norm_rows(qd_context*, const qd_norm*, const float* x, int64_t n, int64_t d, float* out);
/* Of every row of logits (r, v): the first largest index, and log(sum(exp)). */
void qd_row_stats(qd_context*, const float* logits, int64_t r, int64_t v, int32_t* best, float* log_sum);

/* What lies between the matrix products of a training step. dtype: QD_F32 or QD_BF16, of every void pointer's numbers.
 * Slots are sorted by expert; home (N, k) is where token n's slot j lies among the sorted rows. Those that return a
 * number: 0, or 2 (out of memory). */
void qd_gather_rows(qd_context*, const uint8_t* x, int64_t row_bytes, const int64_t* index, int64_t n, uint8_t* out);
void qd_sum_rows(qd_context*, int32_t dtype, const uint8_t* rows, const int64_t* home, int64_t n, int64_t k, int64_t d,
                 uint8_t* out); /* out[i] = sum of rows[home[i, j]] over j, (n, d) */
/* hidden = activation(gate) * up * weights[row], (n, f) */
void qd_hidden(qd_context*, int32_t dtype, int32_t activation, const uint8_t* gate, const uint8_t* up, const float* weights,
               int64_t n, int64_t f, uint8_t* hidden);
/* dh, the gradient of hidden, becomes the gate's; hidden and the gradients of up and weights are written. */
void qd_hidden_back(qd_context*, int32_t dtype, int32_t activation, const uint8_t* gate, const uint8_t* up,
                    const float* weights, int64_t n, int64_t f, uint8_t* dh, uint8_t* hidden, uint8_t* du, float* d_weights);
/* Softmax in place of scores (K, Q, G, keys) over keys [lows[q], offset + q]; the others become 0.
 * slopes (K G,): ALiBi, key - query times it is added; or NULL. */
int32_t qd_attention_softmax(qd_context*, int32_t dtype, uint8_t* scores, const int64_t* lows, int64_t offset,
                             int64_t n_kv_heads, int64_t n_queries, int64_t group, int64_t keys, const float* slopes);
/* The gradient of the probabilities p becomes that of the scores, in place. */
void qd_attention_softmax_back(qd_context*, int32_t dtype, const uint8_t* p, uint8_t* dp, const int64_t* lows, int64_t offset,
                               int64_t n_kv_heads, int64_t n_queries, int64_t group, int64_t keys);
/* Of every row of logits (n, v): logsumexp(scale z) - scale z[target]. gradient: logits become softmax - onehot. */
int32_t qd_cross_entropy(qd_context*, int32_t dtype, uint8_t* logits, const int64_t* targets, int64_t n, int64_t v,
                         float logit_scale, int32_t gradient, float* losses);

/* Bytes a second that all threads read together from `bytes` of memory, for the roofline. */
double qd_read_bandwidth(qd_context*, const uint8_t* data, int64_t bytes, int32_t repeats);
/* Operations a second of the integer (QD_Q8), bf16 (QD_BF16) or float32 (QD_F32) dot product in registers. */
double qd_peak(qd_context*, int32_t format, int64_t iterations);

/* Experts on disk: every expert of every layer is `n_parts` extents ([layer][expert][part]; gate if there is one, up,
 * down), read into a cache of at most `budget` bytes, least recently used out first. */
qd_store* qd_store_create(int32_t n_layers, int32_t n_experts, int32_t n_parts, const int32_t* files, const int64_t* offsets,
                          const int64_t* sizes, int64_t budget, int32_t n_readers);
void qd_store_destroy(qd_store*);
void qd_store_stats(const qd_store*, int64_t out[5]); /* hits, misses, bytes read, bytes held, read errors */

#ifdef __cplusplus
}
#endif
#endif
