// Weights of 8 and 4 bits: decoded in registers, while they are packed or where few rows meet them.
//
// They are stored output by output, each with its numbers along the dim that the forward pass sums. The backward pass
// sums over outputs. In both a panel is packed once for all rows of a task, as that of other weights.
#pragma once

#include "stored_dots.hpp"

namespace moesaic::MOESAIC_ISA {

// A vector of codes, of which the first of each byte is in its high half or its low one, as numbers of a table.
template <bool FIRST_IS_HIGH>
INLINE Reg numbers_of_codes(const uint8_t *p, const float *table) {
  const __m128i half = _mm_set1_epi8(15);
#ifdef __AVX512F__
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
#else
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  const __m128i bytes = _mm_cvtsi32_si128(four);
#endif
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), half), low = _mm_and_si128(bytes, half);
  const __m128i codes = FIRST_IS_HIGH ? _mm_unpacklo_epi8(high, low) : _mm_unpacklo_epi8(low, high);
#ifdef __AVX512F__
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), load(table));
#else
  const __m256i index = _mm256_cvtepu8_epi32(codes);
  const Reg first = _mm256_permutevar8x32_ps(load(table), index), second = _mm256_permutevar8x32_ps(load(table + 8), index);
  return _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
#endif
}

// A vector of numbers of an output, from `k` on, a multiple of the lanes; `n` of them are there. Of 4 bits all are, for
// blocks are whole.
template <int FORMAT>
INLINE Reg decode(const Stored &s, int64_t row, int64_t k, int64_t n) {
  const uint8_t *p = s.data + row * s.row_bytes;
  if constexpr (FORMAT == MOESAIC_INT8) {
    return mul(numbers_of_bytes(p + k, n), all(static_cast<const float *>(s.scales)[row * s.scale_row]));
  } else if constexpr (FORMAT == MOESAIC_NF4) {
    const float scale = static_cast<const float *>(s.scales)[row * s.scale_row + k / kNF4Block];
    return mul(numbers_of_codes<true>(p + k / 2, kNF4), all(scale));
  } else {
    const uint8_t scale = static_cast<const uint8_t *>(s.scales)[row * s.scale_row + k / kMXFP4Block];
    return mul(numbers_of_codes<false>(p + k / 2, kE2M1), all(power_of_two(scale)));
  }
}

// Pairs of bf16: of numbers that follow each other in two vectors, or of those of one row and the next. Only AVX-512 has
// kinds of pairs.
template <class Vector>
INLINE Vector pairs_in_order(Vector first, [[maybe_unused]] Vector second) {
#if defined(__AVX512BF16__)
  return (Vector)_mm512_cvtne2ps_pbh(second, first);
#elif defined(__AVX512F__)
  return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(narrow(first)), narrow(second), 1));
#else
  return first;
#endif
}
template <class Vector>
INLINE Vector pairs_of_rows(Vector first, [[maybe_unused]] Vector second) {
#ifdef __AVX512F__
  const __m512i low = _mm512_cvtepu16_epi32(narrow(first)), high = _mm512_cvtepu16_epi32(narrow(second));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  return first;
#endif
}

// Words along an output: as `Kind::along`.
template <class Kind, int FORMAT>
INLINE Reg words_along(const Stored &s, int64_t row, int64_t k, int64_t n) {
  const Reg first = decode<FORMAT>(s, row, k, n);
  if constexpr (Kind::kStep == 1) {
    return first;
  } else {
    const Reg second = n > kLanes ? decode<FORMAT>(s, row, k + kLanes, n - kLanes) : zero();
    return pairs_in_order(first, second);
  }
}

// Words of the same numbers of one output, or of two that follow each other: as `Kind::columns`.
template <class Kind, int FORMAT>
INLINE Reg words_across(const Stored &s, int64_t row, [[maybe_unused]] bool has_second, int64_t k, int64_t n) {
  const Reg first = decode<FORMAT>(s, row, k, n);
  if constexpr (Kind::kStep == 1) {
    return first;
  } else {
    return pairs_of_rows(first, has_second ? decode<FORMAT>(s, row + 1, k, n) : zero());
  }
}

// Columns `column..column + width` of rows `first..first + n` of the product's weights, as a packed panel.
template <class Kind, int FORMAT>
static void pack_stored(const Stored &s, int64_t first, int64_t n, int64_t column, int64_t width, char *out) {
  if (s.sums_outputs) {
    for (int64_t r = 0; r < n; r += Kind::kStep, out += kPanelBytes) {
      for (int64_t c = 0; c < width; c += kLanes) {
        store(out + c * kWord, words_across<Kind, FORMAT>(s, first + r, r + 1 < n, column + c, width - c));
      }
    }
    return;
  }
  const int64_t words = ceil_div(n, Kind::kStep);
  for (int64_t c = 0; c < width; c += kLanes) {
    for (int64_t w = 0; w < words; w += kLanes) {
      Reg square[kLanes];
      const int64_t there = n - w * Kind::kStep;
      for (int i = 0; i < kLanes; ++i) {
        square[i] = c + i < width ? words_along<Kind, FORMAT>(s, column + c + i, first + w * Kind::kStep, there) : zero();
      }
      transpose(square);
      const int64_t here = least<int64_t>(kLanes, words - w);
      for (int64_t i = 0; i < here; ++i) store(out + (w + i) * kPanelBytes + c * kWord, square[i]);
    }
  }
}

// A task of one panel, whose weights are stored in a format.
template <class Kind, int FORMAT>
static void stored_task(const Product &p, const ProductTask &t, const Place &out, char *packed, float *sums) {
  if (t.rows <= kFewRows && !Stored(p.terms[0], t.matrix).sums_outputs) {
    switch (t.rows) {
      case 1: return stored_dots<Kind, FORMAT, 1>(p, t, out, packed);
      case 2: return stored_dots<Kind, FORMAT, 2>(p, t, out, packed);
      case 3: return stored_dots<Kind, FORMAT, 3>(p, t, out, packed);
      default: return stored_dots<Kind, FORMAT, 4>(p, t, out, packed);
    }
  }
  const Strips strips(t.rows);
  const int64_t blocks = num_blocks<Kind>(p, t);
  for (int64_t i = 0; i < blocks; ++i) {
    const Block b = block<Kind>(p, t, i);
    const Term &term = p.terms[b.term];
    pack_stored<Kind, FORMAT>(Stored(term, t.matrix), b.first, b.count, t.column, t.columns, packed);
    Ahead none, no_rows;
    Tile tile;
    tile.row_step = kWord;
    tile.words = ceil_div(b.count, Kind::kStep);
    tile.panel = packed;
    tile.ahead = &none;
    tile.ahead_rows = &no_rows;
    tile.result = {.first = i == 0,
                   .last = !out.kept && i + 1 == blocks,
                   .row_bytes = out.row_bytes,
                   .columns = t.columns,
                   .is_bf16 = out.is_bf16};
    for (int64_t s = 0; s < strips.count; ++s) {
      const int64_t r = strips.begin(s);
      const int rows = static_cast<int>(strips.begin(s + 1) - r);
      for (int j = 0; j < rows; ++j) tile.rows[j] = words_of_x<Kind>(term, row_of_x(p, t.first_row + r + j), b.first);
      tile.result.y = Place::at(out, r, 0);
      tile.result.sums = sums + r * kPanel;
      multiply_packed<Kind>(rows, t.columns, tile);
    }
  }
}

template <class Kind>
static void stored_product_task(const Product &p, const ProductTask &t, const Place &out, char *packed, float *sums) {
  switch (p.terms[0].scales.format) {
    case MOESAIC_INT8: return stored_task<Kind, MOESAIC_INT8>(p, t, out, packed, sums);
    case MOESAIC_NF4: return stored_task<Kind, MOESAIC_NF4>(p, t, out, packed, sums);
    default: return stored_task<Kind, MOESAIC_MXFP4>(p, t, out, packed, sums);
  }
}

}  // namespace moesaic::MOESAIC_ISA
