// llama.cpp's products on ARM, some number of times, for bench/arm/count.sh: 16 rows of its interleaved formats.
//
//   count_llama KERNEL COLS REPEATS
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
#define PRODUCT(name) void name(int, float*, size_t, const void*, const void*, int, int);
PRODUCT(ggml_gemv_q4_0_4x4_q8_0)
PRODUCT(ggml_gemv_q4_0_4x8_q8_0)
PRODUCT(ggml_gemv_q8_0_4x4_q8_0)
PRODUCT(ggml_gemv_q8_0_4x8_q8_0)
PRODUCT(ggml_gemm_q4_0_4x4_q8_0)
PRODUCT(ggml_gemm_q4_0_4x8_q8_0)
PRODUCT(ggml_gemm_q8_0_4x4_q8_0)
PRODUCT(ggml_gemm_q8_0_4x8_q8_0)
}

int main(int n, char** words) {
  if (n != 4) return 2;
  const int cols = std::atoi(words[2]), repeats = std::atoi(words[3]);
  std::vector<char> weights(size_t(cols) * 16 * 2), tokens(size_t(cols) * 8);
  std::vector<float> out(16 * 4 + 16);
#define CALL(kernel, rows) \
  if (!std::strcmp(words[1], #kernel)) \
    for (int i = 0; i < repeats; ++i) ggml_##kernel##_q8_0(cols, out.data(), 16, weights.data(), tokens.data(), rows, 16);
  CALL(gemv_q4_0_4x4, 1)
  CALL(gemv_q4_0_4x8, 1)
  CALL(gemv_q8_0_4x4, 1)
  CALL(gemv_q8_0_4x8, 1)
  CALL(gemm_q4_0_4x4, 4)
  CALL(gemm_q4_0_4x8, 4)
  CALL(gemm_q8_0_4x4, 4)
  CALL(gemm_q8_0_4x8, 4)
  return out[0] != 0.0f;
}
