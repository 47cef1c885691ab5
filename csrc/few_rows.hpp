// Products of a few rows: as fast as memory gives the weights, which are read once and where they lie.
//
// A processor fetches ahead where memory is read in order, for each such stretch by itself, and for one stretch alone it
// fetches less than memory could give. So weights are read in several places at once, far from each other, and in order
// in each of them. The processor does not fetch beyond the end of a page, so the kernel brings in what lies further on. In
// which order a sum is added up does not depend on the columns of the task.
#pragma once

#include "product.hpp"

namespace moesaic::MOESAIC_ISA {

constexpr int64_t kPlaces = 8;

// A vector of a place was read from here: brings in what lies further on.
INLINE void bring_further(const void *p) {
  if constexpr (kPlacedAhead > 0) _mm_prefetch(static_cast<const char *>(p) + kPlacedAhead, _MM_HINT_T0);
}

// Likewise of a panel's row.
template <class Element>
INLINE void bring_further_row(const Element *p) {
#pragma GCC unroll 4
  for (int c = 0; c < kPanel; c += 64 / sizeof(Element)) bring_further(p + c);
}

// The panel of a task's sums that begins with this column.
template <int ROWS>
INLINE float *panel_of(float *sums, int64_t column) {
  return sums + column * ROWS;
}

// Adds to the sums what some words of the summed dim give: word `first + i * apart` for i below PLACES, or of one place
// `count` words that follow each other.
template <class Kind, int ROWS, int PLACES>
INLINE void add_words(const moesaic_matrix &w, const ProductTask &t, const float *const (&x)[ROWS], int64_t inner,
                      int64_t first, int64_t apart, int64_t count, float *sums) {
  using Element = ElementOf<Kind>;
  const Element *from = element<Kind>(w, first * Kind::kStep, t.column);
  const int64_t to_next = w.row_stride * apart * Kind::kStep;
  int64_t c = 0;
  for (; PLACES > 1 && c + kPanel <= t.columns; c += kPanel, from += kPanel) {
    Reg sum[ROWS][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 6
      for (int v = 0; v < kVectors; ++v) sum[i][v] = zero();
    const Element *p = from;
#pragma GCC unroll 8
    for (int j = 0; j < PLACES; ++j, p += to_next) {
      Reg b[kVectors];
      Kind::panel_row(p, p + w.row_stride, b);
      bring_further_row(p);
      if (Kind::kStep == 2) bring_further_row(p + w.row_stride);
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) {
        const Reg a = broadcast(reinterpret_cast<const char *>(x[i] + first + j * apart));
#pragma GCC unroll 6
        for (int v = 0; v < kVectors; ++v) sum[i][v] = Kind::fma(sum[i][v], a, b[v]);
      }
    }
    float *to = panel_of<ROWS>(sums, c);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 6
      for (int v = 0; v < kVectors; ++v, to += kLanes) store(to, add(load(to), sum[i][v]));
  }
  // Less than a panel, or of the last words: the second row of a pair may be missing.
  for (; c < t.columns; c += kLanes) {
    Reg sum[ROWS];
    for (int i = 0; i < ROWS; ++i) sum[i] = zero();
    for (int64_t j = 0; j < count; ++j) {
      const int64_t word = first + j * apart, k = word * Kind::kStep;
      const Element *p = element<Kind>(w, k, t.column + c);
      const Reg b = Kind::columns(p, Kind::kStep == 1 || k + 1 < inner ? p + w.row_stride : nullptr, t.columns - c);
      for (int i = 0; i < ROWS; ++i) {
        sum[i] = Kind::fma(sum[i], broadcast(reinterpret_cast<const char *>(x[i] + word)), b);
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      float *to = panel_of<ROWS>(sums, c / kPanel * kPanel) + i * kPanel + c % kPanel;
      store(to, add(load(to), sum[i]));
    }
  }
}

// Of weights whose rows are contiguous. A place is a stretch of rows.
template <class Kind, int ROWS>
static void add_rows(const moesaic_matrix &w, const ProductTask &t, const float *const (&x)[ROWS], int64_t inner,
                     float *sums) {
  constexpr int kAtOnce = kPlaces / Kind::kStep;
  const int64_t words = ceil_div(inner, Kind::kStep), apart = inner / Kind::kStep / kAtOnce;
  for (int64_t k = 0; k < apart; ++k) add_words<Kind, ROWS, kAtOnce>(w, t, x, inner, k, apart, kAtOnce, sums);
  const int64_t rest = kAtOnce * apart;
  if (rest < words) add_words<Kind, ROWS, 1>(w, t, x, inner, rest, 1, words - rest, sums);
}

// What columns `first + i * apart` give with all rows.
template <class Kind, int ROWS, int PLACES>
INLINE void add_dots(const moesaic_matrix &w, const ProductTask &t, const float *const (&x)[ROWS], int64_t inner,
                     int64_t first, int64_t apart, float *sums) {
  using Element = ElementOf<Kind>;
  const int64_t words = ceil_div(inner, Kind::kStep);
  const Element *column[PLACES];
#pragma GCC unroll 8
  for (int j = 0; j < PLACES; ++j) column[j] = element<Kind>(w, 0, t.column + first + j * apart);
  Reg sum[PLACES][ROWS];
  for (auto &of_place : sum)
    for (Reg &s : of_place) s = zero();
  int64_t k = 0;
  for (; (k + kLanes) * Kind::kStep <= inner; k += kLanes) {
    Reg a[ROWS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) a[i] = load(x[i] + k);
#pragma GCC unroll 8
    for (int j = 0; j < PLACES; ++j) {
      const Reg b = Kind::along(column[j] + k * Kind::kStep, kLanes * Kind::kStep);
      bring_further(column[j] + k * Kind::kStep);
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) sum[j][i] = Kind::fma(sum[j][i], a[i], b);
    }
  }
  for (; k < words; k += kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < PLACES; ++j) {
      const Reg b = Kind::along(column[j] + k * Kind::kStep, inner - k * Kind::kStep);
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) sum[j][i] = Kind::fma(sum[j][i], load_f32(x[i] + k, words - k), b);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < PLACES; ++j) {
    const int64_t c = first + j * apart;
    float *to = panel_of<ROWS>(sums, c / kPanel * kPanel) + c % kPanel;
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) to[i * kPanel] += total(sum[j][i]);
  }
}

// Of weights whose columns are contiguous. A place is a stretch of columns.
template <class Kind, int ROWS>
static void add_columns(const moesaic_matrix &w, const ProductTask &t, const float *const (&x)[ROWS], int64_t inner,
                        float *sums) {
  constexpr int kAtOnce = (ROWS <= 2 ? 4 : 2) * kVectors / 2;  // as many as there are registers for
  const int64_t apart = t.columns / kAtOnce;
  for (int64_t c = 0; c < apart; ++c) add_dots<Kind, ROWS, kAtOnce>(w, t, x, inner, c, apart, sums);
  for (int64_t c = kAtOnce * apart; c < t.columns; ++c) add_dots<Kind, ROWS, 1>(w, t, x, inner, c, 1, sums);
}

template <class Kind, int ROWS>
static void multiply_in_places(const Product &p, const ProductTask &t, const Place &out, float *sums) {
  __builtin_memset(sums, 0, ceil_div(t.columns, kPanel) * ROWS * kPanelBytes);
  for (int term = 0; term < p.num_terms; ++term) {
    const moesaic_matrix w = weight<Kind>(p.terms[term], t.matrix);
    const float *x[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      x[i] = reinterpret_cast<const float *>(words_of_x<Kind>(p.terms[term], row_of_x(p, t.first_row + i), 0));
    }
    if (w.column_stride == 1) {
      add_rows<Kind, ROWS>(w, t, x, p.inner, sums);
    } else {
      add_columns<Kind, ROWS>(w, t, x, p.inner, sums);
    }
  }
  for (int64_t c = 0; c < t.columns && !out.kept; c += kLanes) {
    const float *from = panel_of<ROWS>(sums, c / kPanel * kPanel) + c % kPanel;
    for (int i = 0; i < ROWS; ++i) Place::put(out, i, c, load(from + i * kPanel), t.columns - c);
  }
}

template <class Kind, int ROWS = kHeight>
static void few_rows(const Product &p, const ProductTask &t, const Place &out, float *sums) {
  if (t.rows == ROWS) return multiply_in_places<Kind, ROWS>(p, t, out, sums);
  if constexpr (ROWS > 1) few_rows<Kind, ROWS - 1>(p, t, out, sums);
}

}  // namespace moesaic::MOESAIC_ISA
