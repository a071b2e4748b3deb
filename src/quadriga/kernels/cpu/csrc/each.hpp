// body(m) for m from 0 to M - 1, written out: arrays that it indexes stay in registers, which a plain loop's do not (gcc 12).
#pragma once
#include "simd.hpp"

template <int M, class Body>
QD_INLINE void each(Body&& body) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) body(m);
}
