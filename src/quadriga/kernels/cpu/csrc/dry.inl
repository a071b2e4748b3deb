// DRY ("don't repeat yourself"), as llama.cpp defines it (llama_sampler_dry_apply); part of sampling.inl.
//
//   ... a b c d ... a b c    the last three tokens stood before d already, so d loses multiplier * base^(3 - allowed)
//
// A repetition is followed back to the last breaker at most. A token that more than one of them would go on with loses for
// the longest; one that is a breaker by itself loses nothing.

int32_t ago(const qd_sampling& s, int64_t i) { return s.history[s.n_history - 1 - i]; }

// Of the breakers that stand where the token of i tokens ago is the first: how many tokens the longest has after it; -1: none.
int64_t breaker_at(const qd_sampling& s, int64_t i) {
  const int32_t head = ago(s, i);
  const int kind = s.breaks ? s.breaks[head] : 0;
  int64_t longest = kind & 1 ? 0 : -1;
  if (!(kind & 2)) return longest;
  for (const int32_t *one = s.breakers, *end = one + s.n_breakers; one < end; one += *one + 1) {
    const int64_t rest = *one - 1;
    if (one[1] != head || rest <= longest || rest > i) continue;
    if (std::equal(one + 2, one + 2 + rest, s.history + s.n_history - i)) longest = rest;
  }
  return longest;
}

// How many tokens there are since the last breaker.
int64_t since_breaker(const qd_sampling& s) {
  for (int64_t i = 0; i < s.n_history; ++i) {
    const int64_t rest = breaker_at(s, i);
    if (rest >= 0) return i - rest;
  }
  return s.n_history;
}

// z[k], k > 0: how many of the last tokens are those before the last k as well (the Z algorithm, Gusfield 1997, from the end).
void repetitions(const qd_sampling& s, int32_t* z) {
  int64_t first = 0, end = 0;  // of the match that reaches farthest back
  for (int64_t k = 1; k < s.n_history; ++k) {
    int64_t length = k < end ? std::min<int64_t>(z[k - first], end - k) : 0;
    if (k + length >= end) {
      while (k + length < s.n_history && ago(s, length) == ago(s, k + length)) ++length;
      first = k, end = k + length;
    }
    z[k] = int32_t(length);
  }
}

// x (V,): logits; z (n_history,), longest (V,): scratch.
void discourage(const qd_sampling& s, float* x, int32_t* z, int32_t* longest) {
  const int64_t limit = s.n_history > s.dry_allowed_length ? since_breaker(s) : -1;
  if (limit < s.dry_allowed_length) return;
  repetitions(s, z);
  const auto each = [&](auto&& body) {
    for (int64_t k = 1; k < s.n_history; ++k) {
      const int64_t length = std::min<int64_t>(z[k], limit);
      if (length >= s.dry_allowed_length) body(ago(s, k - 1), int32_t(length));
    }
  };
  each([&](int32_t token, int32_t) { longest[token] = s.breaks && s.breaks[token] & 1 ? -1 : 0; });
  each([&](int32_t token, int32_t length) {
    if (longest[token] >= 0) longest[token] = std::max(longest[token], length);
  });
  const int64_t most = s.dry_base > 1.000001 ? int64_t(88.7228391 / std::log(s.dry_base)) : 0;  // e^88.7 is all float32 holds
  each([&](int32_t token, int32_t) {
    if (longest[token] < 0) return;
    int64_t power = longest[token] - s.dry_allowed_length;
    if (most > 0) power = std::min(power, most);
    x[token] = bounded(x[token] - float(s.dry_multiplier * std::pow(s.dry_base, double(power))));
    longest[token] = -1;
  });
}
