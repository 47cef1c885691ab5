// A few rows against weights of 8 and 4 bits: decoding, where memory should be the limit and not the decoding of numbers.
//
// Outputs are read one after the other, as they lie. Codes of 4 bits stay in the vector that they are loaded in: a shift
// brings those of one place in each lane to its low bits, by which the lane looks up its number. So a vector holds numbers
// `kInLane` of each lane, and rows of x are put in that order first, once for all outputs of a task. Scales are not for
// numbers but for sums: of a block, which is some lanes, or of an output.
#pragma once

#include "stored.hpp"

namespace moesaic::MOESAIC_ISA {

constexpr int64_t kFewRowsAhead = 4 << 10;  // bytes
constexpr int64_t kCodesInLane = 8;
constexpr int64_t kCodes = kLanes * kCodesInLane;  // of a vector

// Numbers of the summed dim at a time: all rows of x, in order, are in the nearest cache and in the memory of a panel.
template <class Kind>
constexpr int64_t kDotNumbers = least<int64_t>(2048, kProductWords<Kind> * kPanelBytes / (kFewRows * kWord));

// Rows of x, put in order.
struct Ordered {
  float *words;
  int64_t row_words;
};

INLINE Reg words_of(const Ordered &x, int row, int64_t vector) {
  return load(x.words + row * x.row_words + vector * kLanes);
}

// The words of x that meet a vector of codes, number after number in a lane.
template <class Kind, int FORMAT>
INLINE void put_in_order(const float *x, int64_t words, float *out) {
  constexpr int kWords = kCodesInLane / Kind::kStep;
  Reg v[kWords];
#pragma GCC unroll 8
  for (int i = 0; i < kWords; ++i) v[i] = load_f32(x + i * kLanes, words - i * kLanes);
  every_nth(v);
#pragma GCC unroll 8
  for (int i = 0; i < kWords; ++i) {
    // The first of a byte is in its low half, of NF4 in its high half.
    const int number = FORMAT == MOESAIC_NF4 ? i ^ 1 : i;
    store(out + i * kLanes, Kind::number(v, number));
  }
}

// Scales as fp32, of blocks from `block` on.
template <int FORMAT>
INLINE void scales_of_blocks(const Stored &s, int64_t row, int64_t block, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t at = row * s.scale_row + block + i;
    if constexpr (FORMAT == MOESAIC_NF4) {
      store(out + i, load_f32(static_cast<const float *>(s.scales) + at, n - i));
    } else {
      store(out + i, powers_of_two(static_cast<const uint8_t *>(s.scales) + at, n - i));
    }
  }
}

// What numbers `first..first + count` of an output give with each row.
template <class Kind, int FORMAT, int ROWS>
INLINE void dot_of_codes(const Stored &s, int64_t row, int64_t first, int64_t count, const Ordered &x, float (&dots)[ROWS]) {
  constexpr int64_t kBytes = kCodes / 2, kBlock = FORMAT == MOESAIC_NF4 ? kNF4Block : kMXFP4Block;
  constexpr int64_t kBlocks = kCodes / kBlock;  // of a vector
  constexpr int kNumbers = kCodesInLane / Kind::kStep;
  float scales[kDotNumbers<Kind> / kBlock + kLanes];
  scales_of_blocks<FORMAT>(s, row, first / kBlock, count / kBlock, scales);
  const typename Kind::Table table = Kind::table(FORMAT == MOESAIC_NF4 ? kNF4 : kE2M1);
  Reg sum[ROWS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) sum[i] = zero();
  auto vector = [&](const uint8_t *codes, int64_t v) __attribute__((always_inline)) {
    const Bits bits = load_bits(codes);
    Reg of_blocks[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) of_blocks[i] = zero();
#pragma GCC unroll 8
    for (int n = 0; n < kNumbers; ++n) {
      const Reg w = Kind::looked_up(table, shifted(bits, 4 * n));
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) of_blocks[i] = Kind::fma(of_blocks[i], words_of(x, i, v * kNumbers + n), w);
    }
    const Reg scale = spread<kBlock / kCodesInLane>(scales + v * kBlocks);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sum[i] = fma(of_blocks[i], scale, sum[i]);
  };
  const uint8_t *codes = s.data + row * s.row_bytes + first / 2;
  const int64_t whole = count / kCodes, left = count % kCodes;
  for (int64_t v = 0; v < whole; ++v, codes += kBytes) {
    _mm_prefetch(codes + kFewRowsAhead, _MM_HINT_T0);
    vector(codes, v);
  }
  if (left) {
    // What x has beyond the end is zero; the scales there have to be numbers.
    store(scales + count / kBlock, zero());
    uint8_t padded[kBytes] = {};
    __builtin_memcpy(padded, codes, left / 2);
    vector(padded, whole);
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) dots[i] = total(sum[i]);
}

// The same with bytes, which meet x as fp32.
template <int ROWS>
INLINE void dot_of_bytes(const Stored &s, int64_t row, int64_t first, int64_t count, const Ordered &x, float (&dots)[ROWS]) {
  constexpr int kChains = 4;
  Reg sum[ROWS][kChains];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) sum[i][j] = zero();
  const uint8_t *bytes = s.data + row * s.row_bytes + first;
  int64_t v = 0;
  for (; (v + kChains) * kLanes <= count; v += kChains) {
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      // Not into the nearest cache: the row of x fills a quarter of it. Measured on Zen 4, where that is 1.4x faster.
      if (j * kLanes % 64 == 0) _mm_prefetch(bytes + v * kLanes + kFewRowsAhead, _MM_HINT_T1);
      const Reg w = numbers_of_bytes(bytes + (v + j) * kLanes, kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) sum[i][j] = fma(words_of(x, i, v + j), w, sum[i][j]);
    }
  }
  for (; v * kLanes < count; ++v) {
    const Reg w = numbers_of_bytes(bytes + v * kLanes, count - v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sum[i][0] = fma(words_of(x, i, v), w, sum[i][0]);
  }
  const float scale = static_cast<const float *>(s.scales)[row * s.scale_row];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
    dots[i] = total(add(add(sum[i][0], sum[i][1]), add(sum[i][2], sum[i][3]))) * scale;
  }
}

// Numbers `first..first + count` of a row of x, in the order in which the weights meet them.
template <class Kind, int FORMAT>
INLINE void order_row(const Term &term, int64_t row, int64_t first, int64_t count, float *out) {
  const char *from = words_of_x<Kind>(term, row, first);
  if constexpr (FORMAT == MOESAIC_INT8) {
    const auto *numbers = reinterpret_cast<const typename Kind::InWord *>(from);
    for (int64_t k = 0; k < count; k += kLanes) store(out + k, load_elements(numbers + k, count - k));
  } else {
    constexpr int64_t kWords = kCodes / Kind::kStep;
    const int64_t words = ceil_div(count, Kind::kStep);
    for (int64_t w = 0; w < words; w += kWords) {
      put_in_order<Kind, FORMAT>(reinterpret_cast<const float *>(from) + w, words - w, out + w);
    }
  }
}

// Up to ROWS rows against a panel of outputs. `scratch` is for the rows of x.
template <class Kind, int FORMAT, int ROWS>
static void stored_dots(const Product &p, const ProductTask &t, const Place &out, char *scratch) {
  float sums[ROWS][kPanel] = {};
  const Ordered x{reinterpret_cast<float *>(scratch), kDotNumbers<Kind>};
  for (int term = 0; term < p.num_terms; ++term) {
    const Stored s(p.terms[term], t.matrix);
    for (int64_t first = 0; first < p.inner; first += kDotNumbers<Kind>) {
      const int64_t count = least(kDotNumbers<Kind>, p.inner - first);
      for (int i = 0; i < ROWS; ++i) {
        order_row<Kind, FORMAT>(p.terms[term], row_of_x(p, t.first_row + i), first, count, x.words + i * x.row_words);
      }
      for (int64_t c = 0; c < t.columns; ++c) {
        float dots[ROWS];
        if constexpr (FORMAT == MOESAIC_INT8) {
          dot_of_bytes(s, t.column + c, first, count, x, dots);
        } else {
          dot_of_codes<Kind, FORMAT>(s, t.column + c, first, count, x, dots);
        }
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) sums[i][c] += dots[i];
      }
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int64_t c = 0; c < t.columns; c += kLanes) {
      Place::put(out, i, c, load_f32(sums[i] + c, t.columns - c), t.columns - c);
    }
  }
}

}  // namespace moesaic::MOESAIC_ISA
