// AVX2 and FMA: 8 lanes, and the kinds of elements on them.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

namespace moesaic::MOESAIC_ISA {

using Reg = __m256;
constexpr int kLanes = 8;
constexpr int kVectors = 2;  // of a panel's row; 6 x 2 accumulators, 2 of the panel and 2 spare are all 16 registers
constexpr int kHeight = 6;
constexpr int64_t kWideWords = 256;  // of the summed dim where a task has several panels: one fills half of L1
constexpr bool kBringsRows = false;  // rows of x: L2 is near enough
constexpr int64_t kKeptPlacedColumns = 2048;  // of a task of few rows where the sums of two products are kept
constexpr int64_t kPlacedAhead = 0;  // bytes by which few rows' weights are brought in early; not measured

INLINE Reg zero() { return _mm256_setzero_ps(); }
INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
INLINE Reg load(const void *p) { return _mm256_loadu_ps(static_cast<const float *>(p)); }
INLINE void store(void *p, Reg v) { _mm256_storeu_ps(static_cast<float *>(p), v); }
INLINE void stream(void *p, Reg v) { _mm256_stream_ps(static_cast<float *>(p), v); }
INLINE float total(Reg v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
INLINE Reg all(float v) { return _mm256_set1_ps(v); }
INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
INLINE Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
INLINE Reg magnitude(Reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
INLINE Reg nearest(Reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// The second where either is NaN.
INLINE Reg larger(Reg a, Reg b) { return _mm256_max_ps(a, b); }
INLINE Reg smaller(Reg a, Reg b) { return _mm256_min_ps(a, b); }
// `yes` where a <= b, `no` where not or where either is NaN.
INLINE Reg where_at_most(Reg a, Reg b, Reg yes, Reg no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LE_OQ));
}
// a * 2^n of a whole n in -150..128, in two steps of which neither leaves the exponents there are.
INLINE Reg times_power_of_2(Reg a, Reg n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  auto power = [&](__m256i e) __attribute__((always_inline)) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23));
  };
  return mul(mul(a, power(half)), power(_mm256_sub_epi32(whole, half)));
}
INLINE Reg broadcast(const char *p) {
  float word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_ps(word);
}

INLINE __m256i first(int64_t n) {
  const int count = n > 8 ? 8 : static_cast<int>(n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE Reg load_f32(const float *p, int64_t n) { return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first(n)); }
INLINE void store_f32(float *p, Reg v, int64_t n) {
  if (n >= 8) {
    _mm256_storeu_ps(p, v);
  } else {
    _mm256_maskstore_ps(p, first(n), v);
  }
}
INLINE __m128i load_16(const uint16_t *p, int64_t n) {
  if (n >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  uint16_t whole[8] = {0};
  for (int64_t i = 0; i < n; ++i) whole[i] = p[i];
  return _mm_loadu_si128(reinterpret_cast<const __m128i *>(whole));
}
INLINE Reg widen(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }

// To bf16, to nearest even; a NaN stays one.
INLINE __m128i narrow(Reg v) {
  __m256i bits = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
INLINE void store_bf16(uint16_t *p, Reg v, int64_t n) {
  if (n >= 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), narrow(v));
    return;
  }
  uint16_t whole[8];
  _mm_storeu_si128(reinterpret_cast<__m128i *>(whole), narrow(v));
  for (int64_t i = 0; i < n; ++i) p[i] = whole[i];
}
INLINE void stream_bf16(uint16_t *p, Reg lo, Reg hi) {
  _mm256_stream_si256(reinterpret_cast<__m256i *>(p), _mm256_set_m128i(narrow(hi), narrow(lo)));
}

// Up to a vector of elements as fp32, and back.
INLINE Reg load_elements(const float *p, int64_t n) { return load_f32(p, n); }
INLINE Reg load_elements(const uint16_t *p, int64_t n) { return widen(load_16(p, n)); }
INLINE Reg rounded_to(const float *, Reg v) { return v; }
INLINE Reg rounded_to(const uint16_t *, Reg v) { return widen(narrow(v)); }
INLINE void store_elements(float *p, Reg v, int64_t n) { store_f32(p, v, n); }
INLINE void store_elements(uint16_t *p, Reg v, int64_t n) { store_bf16(p, v, n); }

// 8 vectors of 8 words: rows become columns.
INLINE void transpose(Reg *v) {
  Reg t[8], r[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
    v[4 + i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
  }
}

// 32 bytes, of which each lane has 4.
using Bits = __m256i;
INLINE Bits load_bits(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
INLINE Bits shifted(Bits v, int n) { return _mm256_srli_epi32(v, n); }

// A vector of int8 as fp32, of which `n` are there.
INLINE Reg numbers_of_bytes(const uint8_t *p, int64_t n) {
  uint8_t copy[8] = {};
  __builtin_memcpy(copy, p, n < 8 ? n : 8);
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(copy))));
}

// Powers of two of type E8M0, of which `n` are there: 0 is 2^-127, 255 is NaN.
INLINE Reg powers_of_two(const uint8_t *p, int64_t n) {
  uint8_t copy[8] = {};
  __builtin_memcpy(copy, p, n < 8 ? n : 8);
  const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(copy)));
  const __m256i half = _mm256_set1_epi32(0x400000);
  const __m256i is_nan = _mm256_cmpeq_epi32(e, _mm256_set1_epi32(255));
  const __m256i bits = _mm256_max_epu32(_mm256_slli_epi32(e, 23), half);
  return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_and_si256(is_nan, half)));
}

// Each of the numbers from `p` on for N lanes; four may be read.
template <int N>
INLINE Reg spread(const float *p) {
  return N == 8 ? _mm256_set1_ps(*p) : _mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0]));
}

// Of N vectors that follow each other, the words 0, N, 2N, ...; 1, N + 1, 2N + 1, ...; and so on.
template <int N>
INLINE void every_nth(Reg (&v)[N]) {
  static_assert(N == kLanes);
  transpose(v);
}

// What kinds of elements share whose words are fp32.
struct WordsOfF32 {
  using InWord = float;
  struct Table {
    Reg low, high;
  };
  INLINE Table table(const float *numbers) { return {load(numbers), load(numbers + 8)}; }
  // The numbers that stand for the lowest 4 bits of lanes.
  INLINE Reg looked_up(Table table, Bits bits) {
    const Reg low = _mm256_permutevar8x32_ps(table.low, bits), high = _mm256_permutevar8x32_ps(table.high, bits);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 28)));
  }
  // Of vectors of which each lane has numbers that follow each other: that of number `i`.
  INLINE Reg number(const Reg *v, int i) { return v[i]; }
};

struct F32 : WordsOfF32 {
  using Element = float;
  static constexpr int kStep = 1;
  static constexpr bool kWidens = false;
  INLINE Reg fma(Reg sum, Reg a, Reg b) { return _mm256_fmadd_ps(a, b, sum); }
  // Words of the columns from `p` on, of which `n` are there.
  INLINE Reg columns(const float *p, const float *, int64_t n) { return load_f32(p, n); }
  // A whole row of a panel.
  INLINE void panel_row(const float *p, const float *, Reg *out) {
    out[0] = load(p);
    out[1] = load(p + 8);
  }
  // Words along a row, of whose elements `n` are there.
  INLINE Reg along(const float *p, int64_t n) { return load_f32(p, n); }
};

// Nothing multiplies bf16 here: it is converted when packed.
struct BF16 : WordsOfF32 {
  using Element = uint16_t;
  static constexpr int kStep = 1;
  static constexpr bool kWidens = true;
  INLINE Reg fma(Reg sum, Reg a, Reg b) { return _mm256_fmadd_ps(a, b, sum); }
  INLINE Reg columns(const uint16_t *p, const uint16_t *, int64_t n) { return widen(load_16(p, n)); }
  INLINE void panel_row(const uint16_t *p, const uint16_t *, Reg *out) {
    out[0] = widen(load_16(p, 8));
    out[1] = widen(load_16(p + 8, 8));
  }
  INLINE Reg along(const uint16_t *p, int64_t n) { return widen(load_16(p, n)); }
};

}  // namespace moesaic::MOESAIC_ISA
