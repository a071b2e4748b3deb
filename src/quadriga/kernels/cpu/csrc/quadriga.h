/* The C interface of Quadriga's CPU kernels, and the one place where its structs, enums and functions are stated.
 *
 * `make bindings` writes Python's side of it (kernels/cpu/bindings.py) and a table of where every field lies (fields.inl) from it;
 * the library carries this file's hash, so that the two sides know whether they are of one kind. The generator,
 * tools/bindings.py, reads a small part of C and refuses the rest:
 *
 *   #define QD_NAME whole number      enum qd_name { QD_NAME_FIRST = 0, ... }; numbers count up from 0
 *   typedef struct qd_name qd_name;   typedef struct { ... } qd_name;        int32_t qd_name(..., qd_message* why);
 *
 * Every function that can fail returns a qd_status and writes the reason into `why`. No exception leaves the library,
 * from any thread; after a failure the context, the store and everything else are as usable as before. Results go through
 * pointers. A context may be handed to several threads: they take turns.
 *
 * Shape letters as in kernels/ops.py: N packed tokens, D d_model, H heads, K key/value heads, d head_dim, F d_ff,
 * E experts, k experts a token, V vocabulary, R rows whose logits are wanted, S sequences, W channels, L taps. */
#ifndef QUADRIGA_H
#define QUADRIGA_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QD_BLOCK_TOKENS 16   /* tokens of one KV block */
#define QD_KV_CHUNK 256      /* keys whose softmax is taken together, counted from position 0: fixed, so that a result
                                does not depend on batch or threads */
#define QD_MOST_THREADS 1024 /* of one context; the largest machines have some hundreds */
#define QD_MOST_EXPERTS 1024 /* of one layer; published models have up to 512 */

enum qd_status {
  QD_STATUS_OK = 0,
  QD_STATUS_BAD_ARGUMENT = 1,
  QD_STATUS_OUT_OF_MEMORY = 2,
  QD_STATUS_NO_THREAD = 3,       /* the system starts no more */
  QD_STATUS_NO_INSTRUCTIONS = 4, /* this processor lacks the instruction set */
  QD_STATUS_READ_FAILED = 5,     /* experts on disk */
  QD_STATUS_FAILED = 6           /* anything else: a fault of the library */
};
enum qd_format {
  QD_FORMAT_FLOAT32 = 0, QD_FORMAT_BFLOAT16 = 1, QD_FORMAT_Q8 = 2, QD_FORMAT_Q4 = 3, QD_FORMAT_Q4M = 4,
  QD_FORMAT_MX4 = 5,
  /* from here on made of a file's own blocks only */
  QD_FORMAT_IQ4NL = 6, QD_FORMAT_Q5 = 7, QD_FORMAT_Q5M = 8,
  /* of 256 columns */
  QD_FORMAT_Q2K = 9, QD_FORMAT_Q3K = 10, QD_FORMAT_Q4K = 11, QD_FORMAT_Q5K = 12, QD_FORMAT_Q6K = 13, QD_FORMAT_IQ4XS = 14
};
enum qd_source {
  QD_SOURCE_FLOAT32 = 0, QD_SOURCE_BFLOAT16 = 1, QD_SOURCE_FLOAT16 = 2,
  QD_SOURCE_Q8_0 = 3, QD_SOURCE_Q4_0 = 4, QD_SOURCE_Q4_1 = 5,
  QD_SOURCE_MX4 = 6, /* 18 bytes: half of an MXFP4 block's scale as float16, codes 2 j and 2 j + 1 in byte j */
  QD_SOURCE_IQ4_NL = 7, QD_SOURCE_Q5_0 = 8, QD_SOURCE_Q5_1 = 9
};
/* Block formats of GGUF files, under their names in quant/formats.py. */
enum qd_stored {
  QD_STORED_Q4_0 = 0, QD_STORED_Q4_1 = 1, QD_STORED_Q5_0 = 2, QD_STORED_Q5_1 = 3, QD_STORED_Q8_0 = 4,
  QD_STORED_Q2_K = 5, QD_STORED_Q3_K = 6, QD_STORED_Q4_K = 7, QD_STORED_Q5_K = 8, QD_STORED_Q6_K = 9,
  QD_STORED_Q8_K = 10, QD_STORED_IQ4_NL = 11, QD_STORED_IQ4_XS = 12, QD_STORED_TQ1_0 = 13, QD_STORED_TQ2_0 = 14,
  QD_STORED_MXFP4 = 15, QD_STORED_NVFP4 = 16,
  /* from here on numbers are indices of a codebook */
  QD_STORED_IQ1_S = 17, QD_STORED_IQ1_M = 18, QD_STORED_IQ2_XXS = 19, QD_STORED_IQ2_XS = 20, QD_STORED_IQ2_S = 21,
  QD_STORED_IQ3_XXS = 22, QD_STORED_IQ3_S = 23
};
enum qd_kv_format { QD_KV_FORMAT_FLOAT32 = 0, QD_KV_FORMAT_BFLOAT16 = 1, QD_KV_FORMAT_Q8 = 2 };
enum qd_norm_kind { QD_NORM_KIND_LAYER = 0, QD_NORM_KIND_RMS = 1 };
enum qd_activation {
  QD_ACTIVATION_SILU = 0, QD_ACTIVATION_GELU = 1, QD_ACTIVATION_GELU_TANH = 2, QD_ACTIVATION_RELU = 3,
  QD_ACTIVATION_CLAMPED_GLU = 4, /* of gate and up together: (u + 1) g sigmoid(1.702 g), g <= 7, u in [-7, 7] */
  QD_ACTIVATION_RELU2 = 5        /* max(x, 0) squared */
};
enum qd_score { QD_SCORE_SOFTMAX = 0, QD_SCORE_SIGMOID = 1, QD_SCORE_SPARSE_MIXER = 2 };
enum qd_aggregate { QD_AGGREGATE_WEIGHTED_SUM = 0, QD_AGGREGATE_VOTE = 1, QD_AGGREGATE_FUSE = 2 };
/* Of one processor family each has all instructions of the ones before it. */
enum qd_isa { QD_ISA_PORTABLE = 0, QD_ISA_AVX2 = 1, QD_ISA_AVX512 = 2, QD_ISA_NEON = 3, QD_ISA_I8MM = 4 };
enum qd_op {
  QD_OP_EMBED = 0, QD_OP_QKV = 1, QD_OP_ATTEND = 2, QD_OP_ATTN_OUT = 3, QD_OP_FFN = 4, QD_OP_HEAD = 5,
  QD_OP_SHORT_CONV = 6, QD_OP_DELTA_NET = 7, QD_OP_MAMBA2 = 8, QD_OP_MERGE = 9
};

typedef struct qd_context qd_context; /* threads, instruction set, scratch memory; one call at a time, others wait */
typedef struct qd_store qd_store;     /* experts that live on disk */

typedef struct {
  char text[240]; /* in English, ended by a 0 */
} qd_message;

/* Where the compiler put a field ("qd_norm.eps"); of a struct itself ("qd_norm") offset 0 and its size. */
typedef struct {
  const char* name;
  int64_t offset, bytes;
} qd_field;

typedef struct {
  const uint8_t* data; /* packed, 64-byte aligned; NULL where there is no such matrix */
  int64_t rows, cols;
  int32_t format;
} qd_matrix;

typedef struct {
  const float* weight; /* (D,); NULL: no norm */
  int32_t kind;
  float eps;
  const float* bias; /* (D,) or NULL: added at the end */
} qd_norm;

typedef struct {
  qd_matrix table; /* (V, D) */
  float scale;
} qd_embed;

typedef struct {
  qd_norm norm, post_norm;  /* NULL weight: none */
  const qd_matrix* wqkv;    /* (H d + 2 K d, D), in n_wqkv pieces of rows, whose formats may differ */
  int32_t n_wqkv;
  qd_matrix wo; /* (D, H d) */
  int32_t n_heads, n_kv_heads, head_dim, kv_format;
  qd_norm q_norm, k_norm;             /* of q and k before clipping and rotation; NULL weight: none */
  int32_t q_norm_width, k_norm_width; /* numbers that are normed together: d for each head, or H d and K d for all */
  float clip;                  /* 0: none */
  float residual_scale;        /* of what is added to the residual stream */
  float score_scale, soft_cap; /* soft_cap 0: none */
  const float* inverse_frequencies; /* (rotary_dim/2,) or NULL where positions are not rotary */
  const float* alibi_slopes;        /* (H,) or NULL */
  uint8_t* kv;                      /* this layer's blocks, K x qd_kv_bytes(format, d) each */
  int64_t kv_stride;                /* bytes from one of them to the next: at least as many */

  const float* qkv_bias;    /* (H d + 2 K d,) or NULL: added to the projection, before all else */
  const float* out_bias;    /* (D,) or NULL */
  const float* sinks;       /* (H,) or NULL: logits that take part in the softmax and have no value */
  int32_t window;           /* keys a query sees, its own included; 0: all. Blocks it does not see are not read */
  int32_t rotary_dim;       /* numbers of a head that turn, the first ones */
  float rotary_scale;       /* of cos and sin */
  int32_t norm_after_rotation;
  int32_t output_gate; /* 1: H d more rows of wqkv behind v, whose sigmoid multiplies what attention gives */
  int32_t cache_group; /* which of a pass's tables names the layer's blocks */
  int32_t keys_as_values; /* 1: wqkv has no rows for v, which is k as it is projected */
  qd_norm v_norm;         /* of every head's v, (d,); NULL weight: none */

  /* Latent attention, R = kv_rank numbers and rope_dim that turn a token, where kv_rank is not 0: one key of head_dim =
   * R + rope_dim for all heads, whose first R are the value; n_kv_heads is 1, and a block is of qd_latent_bytes. */
  int32_t kv_rank, rope_dim, nope_dim, v_dim; /* R a multiple of 32, v_dim of 16 */
  qd_norm q_a_norm, kv_a_norm;
  qd_matrix wq_a;       /* (Q, D), or data NULL: wqkv (H (nope_dim + rope_dim), Q or D) takes the normed state itself */
  qd_matrix wkv_a;      /* (R + rope_dim, D) */
  qd_matrix wk_b, wv_b; /* a matrix a head: (H R, nope_dim) for queries, (H v_dim, R) for results; wo is (D, H v_dim) */
} qd_attention;

/* A recurrent layer as a whole: out = w_out (c * conv(b * x)), where b, c, x are the thirds of w_in's product. */
typedef struct {
  qd_norm norm, post_norm;
  qd_matrix w_in, w_out; /* (3 W, D), (D, W) */
  const float* taps;     /* (L, W), the oldest position's first */
  float* state;          /* slots x (L - 1, W): b * x of the last positions */
  int32_t n_taps;
  float residual_scale;
} qd_short_conv;

/* A gated delta rule as a whole. q and k (G heads of d_k) and v (H heads of d_v, H / G to each of q's) are convolved, then
 * through silu; q and k are made of unit length, q times d_k^-0.5. With z as many gates as v has numbers, for every head
 *   S = exp(-rate softplus(a + dt)) S;  S = S + k (sigmoid(b) (v - k S));  out = w_out (norm(q S) * silu(z)) */
typedef struct {
  qd_norm norm, post_norm;
  qd_matrix w_in;      /* (2 G d_k + 2 H d_v, D): q, k, v, z */
  qd_matrix w_ba;      /* (2 H, D): b of every head, a of every head */
  qd_matrix w_out;     /* (D, H d_v) */
  const float* taps;   /* (L, 2 G d_k + H d_v), the oldest position's first */
  const float* rate;   /* (H,), positive */
  const float* dt;     /* (H,) */
  qd_norm head_norm;   /* (d_v,), of every head */
  float* state;        /* slots x ((L - 1, 2 G d_k + H d_v) of what is convolved, then S (H, d_k, d_v)) */
  int32_t n_taps, n_k_heads, n_v_heads, k_dim, v_dim;
  int32_t tiled; /* 1: v's head h has q's head h mod G, 0: h / (H / G) */
  float residual_scale;
} qd_delta_net;

/* A Mamba-2 layer as a whole. x (H heads of P) and B and C (G groups of N) are convolved, then through silu; for every head,
 * with B and C of group h / (H / G) and step = softplus(a + dt),
 *   S = exp(-rate step) S + B (step x);  y = C S + skip x;  out = w_out norm(y * silu(z)), the norm over each group's heads */
typedef struct {
  qd_norm norm, post_norm;
  qd_matrix w_in;          /* (2 H P + 2 G N, D): z, x, B, C */
  qd_matrix w_dt;          /* (H, D): a of every head */
  qd_matrix w_out;         /* (D, H P) */
  const float* taps;       /* (L, H P + 2 G N), the oldest position's first */
  const float* conv_bias;  /* (H P + 2 G N,) or NULL */
  const float* rate;       /* (H,), positive */
  const float* dt;         /* (H,) */
  const float* skip;       /* (H,) */
  qd_norm group_norm;      /* weight (H P,) */
  float* state;            /* slots x ((L - 1, H P + 2 G N) of what is convolved, then S (H, N, P)) */
  int32_t n_taps, n_heads, n_groups, state_dim, head_dim;
  float residual_scale;
} qd_mamba2;

typedef struct {
  qd_norm norm, post_norm; /* NULL weight: none */
  qd_matrix router;      /* (E, D) float32; data NULL: one dense network */
  const qd_matrix* gate; /* E of (F, D), or NULL: not gated */
  const qd_matrix* up;   /* E of (F, D) */
  const qd_matrix* down; /* E of (D, F). Formats may differ by expert, but an expert's gate and up take the same kind of
                            activations. An expert whose three have data NULL is somebody else's: nothing is added */
  int32_t n_experts, top_k, activation, aggregate, layer;
  float normalize_p; /* 0: none */
  float residual_scale;
  const float* fuse; /* (E,) for QD_AGGREGATE_FUSE */
  int64_t* load;     /* (E,) running count of tokens per expert, or NULL */
  int32_t* ids;      /* (max N, k) chosen experts of the last pass, in the order they were chosen in, or NULL */
  float* weights;    /* (max N, k) their weights, or NULL */
  float* logits;     /* (max N, E) the router's, before softmax or sigmoid, or NULL */
  qd_store* store;   /* NULL: experts are in memory */
  /* How logits become scores, scores a choice, and scores weights: score / max(norm + eps, min) * scale. */
  int32_t score;                  /* a qd_score */
  int32_t n_groups, top_k_groups; /* groups of neighbours, and the best of them that are chosen from; 1: all experts */
  int32_t group_by_best;          /* a group is as good as its best score; 0: as its two best together */
  float normalize_eps, normalize_min, routed_scale;
  const float* router_bias; /* (E,) added to the logits, or NULL */
  const float* correction;  /* (E,) added to the scores for the choice alone, or NULL */
  const float* gate_bias;   /* (E, F), rows padded to 16s with zeros, or NULL; all three biases or none */
  const float* up_bias;
  const float* down_bias; /* (E, D), padded alike */
  /* The network that every token visits besides, of any width S. */
  qd_matrix shared_gate, shared_up, shared_down; /* (S, D), (S, D), (D, S); data NULL: none, gate's alone: not gated */
  qd_matrix shared_weight; /* (1, D) float32: the sigmoid of its product weighs the network's output; data NULL: 1 */
  int32_t shared_activation;
  float stream_scale; /* what the residual stream is multiplied by at last; 1: nothing */
  /* Where expert_norm has a weight, router and experts read the residual stream through router_norm and expert_norm; what the
   * experts and the shared network give is normed by itself before it is added up. */
  qd_norm router_norm, expert_norm, expert_post_norm, shared_post_norm;
  const float* expert_scale; /* (E,) times the weights, or NULL */
  float near; /* QD_SCORE_SPARSE_MIXER: each of two experts weighs its softmax over those whose logit s, of all but the
                 ones before, has (its own - s) <= near max(|s|, its own) */
} qd_ffn;

typedef struct {
  qd_norm norm;
  qd_matrix weight; /* (V, D) */
  float logit_scale;
  const float* bias; /* (V,) or NULL: added before the scale */
  float logit_cap;   /* c: logits become c tanh(logits / c) behind the scale; 0: as they are */
} qd_head;

/* The end of a branch that several ranks have a part of: what they left in the batch's branches is added up in their
 * order, so that all have the same bits; then as at the end of an op that has a branch for itself. */
typedef struct {
  qd_norm post_norm; /* weight NULL: none */
  const float* bias; /* (D,) or NULL */
  float residual_scale, stream_scale; /* of the branch; at last of all of hidden */
  int32_t d_model;
} qd_merge;

/* What one forward pass is given. Sequence s owns tokens [starts[s], starts[s+1]), which end its positions. */
typedef struct {
  int32_t n_tokens, n_sequences, n_rows;
  const int32_t* tokens;       /* (N,) */
  const int32_t* positions;    /* (N,) */
  const int32_t* starts;       /* (S + 1,) */
  const int32_t* tables;       /* (groups, table_size) KV blocks of all sequences, end to end; -1: nobody sees it */
  const int32_t* table_starts; /* (S + 1,) */
  const int32_t* rows;         /* (R,) tokens whose logits are wanted */
  float* logits;               /* (R, V) */
  float* hidden;               /* (N, D) the residual stream; scratch of the caller */
  /* (S,) slots of recurrent states, or NULL where no layer has one: read before a sequence's first token, -1 for zeros, and
   * written after its last. No sequence reads or writes a slot that another one writes. */
  const int32_t* before;
  const int32_t* after;
  int64_t table_size;          /* blocks in one group's tables */
  /* (n_branches, N, D), or NULL. Ops that end a branch (QD_OP_ATTN_OUT, QD_OP_FFN, QD_OP_SHORT_CONV, QD_OP_DELTA_NET,
   * QD_OP_MAMBA2) leave its sum in place `branch` of these instead of adding it to hidden, without bias, post_norm and
   * scales. */
  float* branches;
  int32_t n_branches, branch;
} qd_batch;

typedef struct {
  int32_t kind;   /* a qd_op */
  const void* op; /* what that op takes: qd_embed, qd_attention, qd_ffn, qd_head, qd_short_conv, qd_delta_net,
                   * qd_mamba2 or qd_merge */
} qd_step;

/* What became of a row of logits. */
typedef struct {
  int32_t token;  /* -1: none may be chosen */
  int32_t n_top;  /* listed: n_top, or as many as there are */
  float log_sum;  /* log(sum(exp(logits))); not finite where a logit is not: no token then */
  float logit;    /* the token's own, as it came */
} qd_sampled;

/* How one row of logits becomes a token. Fields whose count is 0 may be NULL. The order of it all is that of
 * engine/request.py: penalties, DRY and bias, temperature, top-k, typical, top-p, min-p, XTC, one draw. */
typedef struct {
  const float* logits;      /* (V,), not changed */
  const uint8_t* allowed;   /* (V,) 1 where a token may be chosen, or NULL: all may */
  const int32_t* unused;    /* (n_unused,) ids that are never chosen and never listed */
  const int32_t* early;     /* (n_early,) ids that are not chosen unless nothing else is allowed */
  const int32_t* said;      /* (n_said,) different ids of prompt and answer */
  const int32_t* counts;    /* (n_said,) how often each is in the answer */
  const int32_t* moved;     /* (n_moved,) different ids */
  const float* moves;       /* (n_moved,) what is added to their logits */
  const int32_t* history;   /* (n_history,) tokens so far in which DRY looks for repetitions, the newest last; each below V */
  const uint8_t* breaks;    /* (V,) 1: the token ends repetitions, 2: it begins longer sequences that do, 3: both; or NULL */
  const int32_t* breakers;  /* (n_breakers,) these sequences one after the other, before each the number of its tokens */
  int32_t n_history, n_breakers, dry_allowed_length; /* repetitions of so many tokens cost the next one something */
  int32_t n_unused, n_early, n_said, n_moved;
  double temperature, repetition_penalty, presence_penalty, frequency_penalty; /* temperature 0: greedy */
  double top_p, min_p, typical_p; /* 1, 0, 1: all stay */
  double xtc_probability, xtc_threshold; /* 0: none */
  double dry_multiplier, dry_base; /* of the DRY penalty: multiplier base^(length - allowed) */
  int32_t top_k, n_top; /* 0: all stay; the most probable tokens to list */
  int64_t seed, position; /* the draw is Philox's for this key and counter */
  int32_t* top_ids;     /* (n_top,), the most probable first, the lower id first of equal ones */
  float* top_logits;    /* (n_top,) */
  qd_sampled chosen;    /* what qd_sample found */
} qd_sampling;

/* Blocks of sub-blocks whose scales are whole numbers under the block's own; quant/search.py says what is found, and in
 * which form. Without minima a number is one of low .. high, or one of the codebook, and a scale from least to most; with
 * them it is from 0 to high, and scales and minima from 0 to most. */
typedef struct {
  const float* x;          /* (n, length), finite */
  const float* weight;     /* alike, positive, or NULL: ones */
  const uint8_t* codebook; /* 16 of int8, ascending (length 32), or NULL */
  int64_t n;               /* sub-blocks, whole blocks of them */
  int32_t length, per_block; /* 16 or 32; 1, 8 or 16 */
  int32_t low, high, least, most;
  float* d;                /* (n / per_block,) */
  float* m;                /* alike, or NULL */
  float* scales;           /* (n,) */
  float* minima;           /* alike, or NULL */
  float* numbers;          /* (n, length) */
} qd_search;

typedef struct {
  int64_t hits, misses; /* experts found in memory, and read */
  int64_t bytes_read, bytes_held;
} qd_store_counts;

/* What the library asked of the system since the last qd_watch_allocations: memory and threads. */
typedef struct {
  int64_t made, failed;
  int64_t elsewhere; /* made by other threads than the one that asked to watch */
} qd_allocations;

const char* qd_header_sha256(void); /* of this file, 64 hexadecimal digits */
const qd_field* qd_fields(void);    /* of every struct above, in any order, ended by a NULL name */

/* Whether this library and this processor have an instruction set. */
int32_t qd_has_isa(int32_t isa, int32_t* has, qd_message* why);
int32_t qd_create(int32_t n_threads, int32_t isa, qd_context** context, qd_message* why);
int32_t qd_destroy(qd_context* context, qd_message* why);
/* 1: activations of quantised matrices (q8 and all after it) in 15 bits instead of 8. */
int32_t qd_set_int16(qd_context* context, int32_t int16, qd_message* why);

int32_t qd_packed_bytes(int32_t format, int64_t rows, int64_t cols, int64_t* bytes, qd_message* why);
/* Of one block of one head, keys and values. */
int32_t qd_kv_bytes(int32_t kv_format, int32_t head_dim, int64_t* bytes, qd_message* why);
/* Of one block of latents, rank + rope_dim numbers each, which are keys and values of all heads. */
int32_t qd_latent_bytes(int32_t kv_format, int32_t rank, int32_t rope_dim, int64_t* bytes, qd_message* why);

/* Pack rows x cols numbers stored row-major as `source` (rows `row_bytes` apart) into out (qd_packed_bytes).
 * Block sources are copied bit by bit and need the matching format (q8_0 -> q8, q4_0 -> q4, q4_1 -> q4m, mx4 -> mx4,
 * iq4_nl -> iq4nl, q5_0 -> q5, q5_1 -> q5m). Formats of blocks of 256 are made of such blocks only: qd_pack_stored.
 * importance: (cols,) weight of each column's squared error in the scale search, or NULL for one.
 * bad_row: the first row that holds a number the format cannot store, or -1. */
int32_t qd_pack(qd_context* context, int32_t source, const void* in, int64_t row_bytes, int64_t rows, int64_t cols,
                int32_t format, uint8_t* out, const float* importance, int64_t* bad_row, qd_message* why);
/* qd_pack of the numbers that blocks of any qd_stored stand for; see qd_dequantize. Where q8 holds them exactly (q4_0, q5_0,
 * iq4_nl, tq1_0, tq2_0, mxfp4 under scales that float16 has), it does. Blocks of 256 are copied bit by bit into their own
 * format (q4_k -> q4k and so on), the last of a row also where cols is no multiple of 256. */
int32_t qd_pack_stored(qd_context* context, int32_t stored, const uint8_t* in, int64_t row_bytes, int64_t rows, int64_t cols,
                       const uint8_t* codebook, int32_t format, uint8_t* out, const float* importance, int64_t* bad_row,
                       qd_message* why);
/* Rows [first, first + n) of a packed matrix as float32 (n, cols). */
int32_t qd_unpack(qd_context* context, int32_t format, const uint8_t* packed, int64_t cols, int64_t first, int64_t n,
                  float* out, qd_message* why);

/* n blocks that lie one after the other, as float32. codebook: the format's table of int8 (quant/codebooks.py) where its
 * numbers are indices of one, else NULL. */
int32_t qd_dequantize(qd_context* context, int32_t stored, const uint8_t* blocks, int64_t n, const uint8_t* codebook,
                      float* out, qd_message* why);

/* Scales for numbers that are to be quantised. Runs on the thread that calls it; any number of threads may. */
int32_t qd_find_scales(qd_context* context, const qd_search* search, qd_message* why);

/* One op, or a whole captured step. */
int32_t qd_run(qd_context* context, const qd_step* steps, int32_t n_steps, const qd_batch* batch, qd_message* why);
/* (n, cols) -> (n, rows) */
int32_t qd_linear(qd_context* context, const qd_matrix* matrix, const float* x, int64_t n, float* out, qd_message* why);
int32_t qd_norm_rows(qd_context* context, const qd_norm* norm, const float* x, int64_t n, int64_t d, float* out,
                     qd_message* why);
/* Of every row of logits (r, v): the first largest index, and log(sum(exp)). */
int32_t qd_row_stats(qd_context* context, const float* logits, int64_t r, int64_t v, int32_t* best, float* log_sum,
                     qd_message* why);

/* A token for each of n rows of logits (v,): rows are n addresses, of different structs. Rows are independent of one another
 * and of the number of threads. */
int32_t qd_sample(qd_context* context, qd_sampling** rows, int64_t n, int64_t v, qd_message* why);

/* What lies between the matrix products of a training step. dtype: QD_FORMAT_FLOAT32 or QD_FORMAT_BFLOAT16, of every
 * uint8_t pointer's numbers. Slots are sorted by expert; home (N, k) is where token n's slot j lies among the sorted
 * rows. */
int32_t qd_gather_rows(qd_context* context, const uint8_t* x, int64_t row_bytes, const int64_t* index, int64_t n,
                       uint8_t* out, qd_message* why);
/* out[i] = sum of rows[home[i, j]] over j, (n, d) */
int32_t qd_sum_rows(qd_context* context, int32_t dtype, const uint8_t* rows, const int64_t* home, int64_t n, int64_t k,
                    int64_t d, uint8_t* out, qd_message* why);
/* hidden = activation(gate) * up * weights[row], (n, f); up NULL: 1, of networks without a gate */
int32_t qd_hidden(qd_context* context, int32_t dtype, int32_t activation, const uint8_t* gate, const uint8_t* up,
                  const float* weights, int64_t n, int64_t f, uint8_t* hidden, qd_message* why);
/* dh, the gradient of hidden, becomes the gate's; hidden and the gradients of up (NULL where up is) and weights are
 * written. */
int32_t qd_hidden_back(qd_context* context, int32_t dtype, int32_t activation, const uint8_t* gate, const uint8_t* up,
                       const float* weights, int64_t n, int64_t f, uint8_t* dh, uint8_t* hidden, uint8_t* du,
                       float* d_weights, qd_message* why);
/* Softmax in place of scores (K, Q, G, keys) over keys [lows[q], offset + q]; the others become 0.
 * slopes (K G,): ALiBi, key - query times it is added; or NULL. */
int32_t qd_attention_softmax(qd_context* context, int32_t dtype, uint8_t* scores, const int64_t* lows, int64_t offset,
                             int64_t n_kv_heads, int64_t n_queries, int64_t group, int64_t keys, const float* slopes,
                             qd_message* why);
/* The gradient of the probabilities p becomes that of the scores, in place. */
int32_t qd_attention_softmax_back(qd_context* context, int32_t dtype, const uint8_t* p, uint8_t* dp,
                                  const int64_t* lows, int64_t offset, int64_t n_kv_heads, int64_t n_queries,
                                  int64_t group, int64_t keys, qd_message* why);
/* Of every row of logits (n, v): logsumexp(scale z) - scale z[target]. gradient: logits become softmax - onehot. */
int32_t qd_cross_entropy(qd_context* context, int32_t dtype, uint8_t* logits, const int64_t* targets, int64_t n,
                         int64_t v, float logit_scale, int32_t gradient, float* losses, qd_message* why);

/* Bytes a second that all threads read together from `bytes` of memory, for the roofline. */
int32_t qd_read_bandwidth(qd_context* context, const uint8_t* data, int64_t bytes, int32_t repeats, double* rate,
                          qd_message* why);
/* Operations a second of the format's dot product in registers. */
int32_t qd_peak(qd_context* context, int32_t format, int64_t iterations, double* rate, qd_message* why);

/* Experts on disk: every expert of every layer is `n_parts` extents ([layer][expert][part]; gate if there is one, up,
 * down), read into a cache of at most `budget` bytes, least recently used out first. */
int32_t qd_store_create(int32_t n_layers, int32_t n_experts, int32_t n_parts, const int32_t* files,
                        const int64_t* offsets, const int64_t* sizes, int64_t budget, int32_t n_readers,
                        qd_store** store, qd_message* why);
int32_t qd_store_destroy(qd_store* store, qd_message* why);
int32_t qd_store_stats(const qd_store* store, qd_store_counts* counts, qd_message* why);

/* For tests. seen: what was asked for since the last call. From now on the number `fail_at`, counted from 0, fails; -1
 * fails none. Counting is for the whole process and costs a load and a branch; -2 ends it. */
int32_t qd_watch_allocations(int64_t fail_at, qd_allocations* seen, qd_message* why);
/* For tests. A parallel phase in which every thread but the caller throws, or the caller if there is no other. */
int32_t qd_throw_in_phase(qd_context* context, qd_message* why);

#ifdef __cplusplus
}
#endif
#endif
