// AVX-512: 16 lanes, and the kinds of elements on them.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

namespace moesaic::MOESAIC_ISA {

using Reg = __m512;
constexpr int kLanes = 16;
constexpr int kVectors = 4;  // of a panel's row; 6 x 4 accumulators, 4 of the panel and 2 spare are all 32 registers
constexpr int kHeight = 6;
constexpr int64_t kWideWords = 96;  // of the summed dim where a task has several panels
constexpr bool kBringsRows = true;  // rows of x
constexpr int64_t kKeptPlacedColumns = 4096;  // of a task of few rows where the sums of two products are kept
constexpr int64_t kPlacedAhead = 2 << 10;  // bytes by which few rows' weights are brought in early

INLINE Reg zero() { return _mm512_setzero_ps(); }
INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
INLINE Reg load(const void *p) { return _mm512_loadu_ps(p); }
INLINE void store(void *p, Reg v) { _mm512_storeu_ps(p, v); }
INLINE void stream(void *p, Reg v) { _mm512_stream_ps(static_cast<float *>(p), v); }
INLINE float total(Reg v) { return _mm512_reduce_add_ps(v); }
INLINE Reg all(float v) { return _mm512_set1_ps(v); }
INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
INLINE Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
INLINE Reg magnitude(Reg a) { return _mm512_abs_ps(a); }
INLINE Reg nearest(Reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// The second where either is NaN.
INLINE Reg larger(Reg a, Reg b) { return _mm512_max_ps(a, b); }
INLINE Reg smaller(Reg a, Reg b) { return _mm512_min_ps(a, b); }
// `yes` where a <= b, `no` where not or where either is NaN.
INLINE Reg where_at_most(Reg a, Reg b, Reg yes, Reg no) {
  return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), yes);
}
// a * 2^n of a whole n in -150..128.
INLINE Reg times_power_of_2(Reg a, Reg n) { return _mm512_scalef_ps(a, n); }
INLINE Reg broadcast(const char *p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_castsi512_ps(_mm512_set1_epi32(word));
}

INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
INLINE __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

INLINE Reg load_f32(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
INLINE void store_f32(float *p, Reg v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
INLINE __m256i load_16(const uint16_t *p, int64_t n) {
  return _mm256_maskz_loadu_epi16(first(n), p);  // of 512 bits it would wait for the next line as well
}
INLINE Reg widen(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// To bf16, to nearest even; a NaN stays one.
INLINE __m256i narrow(Reg v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
#endif
}
INLINE void store_bf16(uint16_t *p, Reg v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(v));
}
INLINE void stream_bf16(uint16_t *p, Reg lo, Reg hi) {
  __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(lo)), narrow(hi), 1);
  _mm512_stream_si512(reinterpret_cast<__m512i *>(p), both);
}

// Up to a vector of elements as fp32, and back.
INLINE Reg load_elements(const float *p, int64_t n) { return load_f32(p, n); }
INLINE Reg load_elements(const uint16_t *p, int64_t n) { return widen(load_16(p, n)); }
INLINE Reg rounded_to(const float *, Reg v) { return v; }
INLINE Reg rounded_to(const uint16_t *, Reg v) { return widen(narrow(v)); }
INLINE void store_elements(float *p, Reg v, int64_t n) { store_f32(p, v, n); }
INLINE void store_elements(uint16_t *p, Reg v, int64_t n) { store_bf16(p, v, n); }

// 16 vectors of 16 words: rows become columns.
INLINE void transpose(Reg *v) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(v[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
    v[8 + i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
    v[4 + i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
    v[12 + i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
  }
}

// 64 bytes, of which each lane has 4.
using Bits = __m512i;
INLINE Bits load_bits(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE Bits shifted(Bits v, unsigned n) { return _mm512_srli_epi32(v, n); }

// A vector of int8 as fp32, of which `n` are there.
INLINE Reg numbers_of_bytes(const uint8_t *p, int64_t n) {
  const __m128i bytes =
      n >= 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)) : _mm_maskz_loadu_epi8(first(n), p);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

// Powers of two of type E8M0, of which `n` are there: 0 is 2^-127, 255 is NaN.
INLINE Reg powers_of_two(const uint8_t *p, int64_t n) {
  const __m512i e = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)), half = _mm512_set1_epi32(0x400000);
  const __m512i bits = _mm512_max_epu32(_mm512_slli_epi32(e, 23), half);
  const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(255));
  return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, is_nan, bits, half));
}

// Each of the numbers from `p` on for N lanes; four may be read.
template <int N>
INLINE Reg spread(const float *p) {
  const __m512i numbers = N == 8 ? _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)
                                 : _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(numbers, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

// Of N vectors that follow each other, the words 0, N, 2N, ...; 1, N + 1, 2N + 1, ...; and so on.
template <int N>
INLINE void every_nth(Reg (&v)[N]) {
  if constexpr (N > 1) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    Reg evens[N / 2], odds[N / 2];
#pragma GCC unroll 4
    for (int i = 0; i < N / 2; ++i) {
      evens[i] = _mm512_permutex2var_ps(v[2 * i], even, v[2 * i + 1]);
      odds[i] = _mm512_permutex2var_ps(v[2 * i], odd, v[2 * i + 1]);
    }
    every_nth(evens);
    every_nth(odds);
#pragma GCC unroll 4
    for (int i = 0; i < N / 2; ++i) {
      v[2 * i] = evens[i];
      v[2 * i + 1] = odds[i];
    }
  }
}

// What kinds of elements share whose words are fp32.
struct WordsOfF32 {
  using InWord = float;
  using Table = Reg;
  INLINE Table table(const float *numbers) { return load(numbers); }
  // The numbers that stand for the lowest 4 bits of lanes.
  INLINE Reg looked_up(Table table, Bits bits) { return _mm512_permutexvar_ps(bits, table); }
  // Of vectors of which each lane has numbers that follow each other: that of number `i`.
  INLINE Reg number(const Reg *v, int i) { return v[i]; }
};

struct F32 : WordsOfF32 {
  using Element = float;
  static constexpr int kStep = 1;
  static constexpr bool kWidens = false;
  INLINE Reg fma(Reg sum, Reg a, Reg b) { return _mm512_fmadd_ps(a, b, sum); }
  // Words of the columns from `p` on, of which `n` are there.
  INLINE Reg columns(const float *p, const float *, int64_t n) { return load_f32(p, n); }
  // A whole row of a panel.
  INLINE void panel_row(const float *p, const float *, Reg *out) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) out[v] = load(p + 16 * v);
  }
  // Words along a row, of whose elements `n` are there.
  INLINE Reg along(const float *p, int64_t n) { return load_f32(p, n); }
};

// bf16 where nothing multiplies it: converted when packed.
struct WideBF16 : WordsOfF32 {
  using Element = uint16_t;
  static constexpr int kStep = 1;
  static constexpr bool kWidens = true;
  INLINE Reg fma(Reg sum, Reg a, Reg b) { return _mm512_fmadd_ps(a, b, sum); }
  INLINE Reg columns(const uint16_t *p, const uint16_t *, int64_t n) { return widen(load_16(p, n)); }
  INLINE void panel_row(const uint16_t *p, const uint16_t *, Reg *out) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      out[v] = widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 16 * v)));
    }
  }
  INLINE Reg along(const uint16_t *p, int64_t n) { return widen(load_16(p, n)); }
};

// Pairs of bf16, multiplied and summed in fp32 by one instruction where there is one.
struct PairsOfBF16 {
  using Element = uint16_t;
  static constexpr int kStep = 2;
  static constexpr bool kWidens = false;
  INLINE Reg fma(Reg sum, Reg a, Reg b) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    return _mm512_fmadd_ps(first(a), first(b), _mm512_fmadd_ps(second(a), second(b), sum));
#endif
  }
  // The second row may be missing at the end of an odd dim.
  INLINE Reg columns(const uint16_t *p, const uint16_t *q, int64_t n) {
    __m512i low = _mm512_cvtepu16_epi32(load_16(p, n));
    if (!q) return _mm512_castsi512_ps(low);
    __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16(q, n)), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(low, high));
  }
  INLINE void panel_row(const uint16_t *p, const uint16_t *q, Reg *out) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54,
                                          22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i a = _mm512_loadu_si512(p + 32 * half), b = _mm512_loadu_si512(q + 32 * half);
      out[2 * half] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b));
      out[2 * half + 1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b));
    }
  }
  INLINE Reg along(const uint16_t *p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(first32(n), p));
  }
  // See WordsOfF32. Twice in a register, for the bit above the 4 counts, too.
  using InWord = uint16_t;
  using Table = __m512i;
  INLINE Table table(const float *numbers) {
    const __m256i once = narrow(load(numbers));
    return _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
  }
  INLINE Reg looked_up(Table table, Bits bits) { return _mm512_castsi512_ps(_mm512_permutexvar_epi16(bits, table)); }
  // Lanes have 8 numbers, of which a pair is `i` and `i + 4`.
  INLINE Reg number(const Reg *v, int i) {
    const __m512i a = _mm512_castps_si512(v[i / 2]), b = _mm512_castps_si512(v[i / 2 + 2]);
    const __m512i high = _mm512_set1_epi32(0xffff0000);
    return _mm512_castsi512_ps(i % 2 ? _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, high))
                                     : _mm512_or_si512(_mm512_andnot_si512(high, a), _mm512_slli_epi32(b, 16)));
  }

 private:
  INLINE Reg first(Reg pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
  INLINE Reg second(Reg pairs) { return _mm512_and_ps(pairs, _mm512_castsi512_ps(_mm512_set1_epi32(0xffff0000))); }
};

#ifdef __AVX512BF16__
using BF16 = PairsOfBF16;
#else
using BF16 = WideBF16;
#endif

}  // namespace moesaic::MOESAIC_ISA
