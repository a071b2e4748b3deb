// Which experts a token visits, and what each of them weighs.
#pragma once
#include "context.hpp"

// What every token's router decides, (n, k), and what is kept of it.
struct Routing {
  int32_t* ids;
  float *weights, *logits, *shared;  // logits (n, E) or NULL; shared (n,) what that network's output weighs, or NULL
};

// For all rows of x (n, d).
void route(qd_context&, const qd_ffn&, const float* x, int64_t n, int64_t d, const Routing&);
