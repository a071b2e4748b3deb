// Recurrent layers, token by token: what a sequence's rows become does not depend on how they were cut.

namespace {

void short_conv(const ConvPart& p) {
  const int kept = p.n_taps - 1;
  for (int64_t c = p.first; c < p.end; c += 16) {
    const int64_t m = p.end - c;
    vf past[kMostTaps], taps[kMostTaps];  // the oldest first
    for (int j = 0; j < kept; ++j) past[j] = p.before ? load_part(p.before + j * p.width + c, m, 0.0f) : all(0.0f);
    for (int j = 0; j <= kept; ++j) taps[j] = load_part(p.taps + j * p.width + c, m, 0.0f);
    for (int64_t t = 0; t < p.n; ++t) {
      const float* row = p.rows + t * 3 * p.width + c;
      past[kept] = load_part(row, m, 0.0f) * load_part(row + 2 * p.width, m, 0.0f);
      vf sum = taps[0] * past[0];
      for (int j = 1; j <= kept; ++j) sum = fma(taps[j], past[j], sum);
      store_part(p.out + t * p.width + c, m, sum * load_part(row + p.width, m, 0.0f));
      for (int j = 0; j < kept; ++j) past[j] = past[j + 1];
    }
    for (int j = 0; j < kept; ++j) store_part(p.after + j * p.width + c, m, past[j]);
  }
}

}  // namespace
