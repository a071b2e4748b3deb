// Choices beyond the largest weights; part of sampling.inl.

// Of tokens with `keys` and weights, both in order of id: the largest key up to which the smallest ones, taken one by one,
// reach `target`, and how many of that very key that takes. The two are overwritten.
Cut reach_up(float* keys, float* weights, int64_t n, double target) {
  double before = 0;
  while (n) {
    float sample[9];
    for (int i = 0; i < 9; ++i) sample[i] = keys[(2 * i + 1) * n / 18];
    std::nth_element(sample, sample + 4, sample + 9);
    const vf pivot = all(sample[4]);
    vd under = no_doubles(), equal = no_doubles();
    for (int64_t i = 0; i < n; i += 16) {
      const vf key = load_part(keys + i, n - i, INFINITY), w = load_part(weights + i, n - i, 0.0f);
      under = add(under, greater_select(pivot, key, w, all(0.0f)));
      equal = add(equal, greater_select(pivot, key, all(0.0f), greater_select(key, pivot, all(0.0f), w)));
    }
    const double low = before + sum_doubles(under), both = low + sum_doubles(equal);
    const bool down = low >= target;
    if (!down && both >= target) {
      double sum = low;
      Cut cut{sample[4], 0};
      for (int64_t i = 0; i < n && sum < target; ++i)
        if (keys[i] == sample[4]) sum += double(weights[i]), ++cut.n_equal;
      return cut;
    }
    int64_t left = 0;
    for (int64_t i = 0; i < n; i += 16) {  // in place: what is written has been read
      const vf key = load_part(keys + i, n - i, INFINITY), w = load_part(weights + i, n - i, 0.0f);
      const uint32_t here = n - i >= 16 ? 0xffffu : (1u << (n - i)) - 1;
      const uint32_t bits = here & (down ? greater_bits(pivot, key) : greater_bits(key, pivot));
      if (!bits) continue;
      press(weights + left, w, bits);
      left += press(keys + left, key, bits);
    }
    if (!down) before = both;
    n = left;
  }
  return {INFINITY, INT64_MAX};
}

// Locally typical sampling (Meister et al. 2023): the tokens whose information is nearest to the entropy, until their
// probabilities reach `part`. The difference of the two is ln w less the mean of ln w under the weights.
void keep_typical(Weights& all_of, double part) {
  vd moment = no_doubles();
  const int64_t n = all_of.blocks * kSampleBlock;
  for (int64_t i = 0; i < n; i += 16) {
    const vf w = load(all_of.w + i);
    moment = add(moment, greater_select(w, all(0.0f), w * load(all_of.logs + i), all(0.0f)));
  }
  const double total = sum_of_all(all_of);
  const vf mean = all(float(sum_doubles(moment) / total));
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const vf w = load(all_of.w + i), key = vabs(load(all_of.logs + i) - mean);
    const uint32_t bits = greater_bits(w, all(0.0f));
    store(all_of.logs + i, key);
    if (!bits) continue;
    press(all_of.others + found, w, bits);
    found += press(all_of.some + found, key, bits);
  }
  Cut cut = reach_up(all_of.some, all_of.others, found, part * total);
  for (int64_t i = 0; i < n; i += 16) {
    const vf w = load(all_of.w + i), key = load(all_of.logs + i);
    uint32_t equal = at_least_bits(key, all(cut.least)) & ~greater_bits(key, all(cut.least)) & greater_bits(w, all(0.0f));
    store(all_of.w + i, greater_select(key, all(cut.least), all(0.0f), w));
    for (; equal; equal &= equal - 1)
      if (cut.n_equal-- <= 0) all_of.w[i + __builtin_ctz(equal)] = 0.0f;
  }
  for (int64_t block = 0; block < all_of.blocks; ++block) sum_block(all_of, block);
}

// XTC: of several tokens that have at least `threshold` of the weights all but the last go, the least likely one, of equal
// ones that with the highest id.
void drop_best(Weights& all_of, double threshold) {
  const double limit = threshold * sum_of_all(all_of);
  int64_t last = -1, n = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t block = 0; block < all_of.blocks; ++block) {
      if (double(all_of.most[block]) < limit) continue;
      for (int64_t i = block * kSampleBlock; i < (block + 1) * kSampleBlock; ++i) {
        float& w = all_of.w[i];
        if (w <= 0 || double(w) < limit) continue;
        if (pass) w = i == last ? w : 0.0f;
        else if (++n, last < 0 || w <= all_of.w[last]) last = i;
      }
      if (pass) sum_block(all_of, block);
    }
    if (n < 2) return;
  }
}
