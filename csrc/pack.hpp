// Panels: the words of an operand in the order in which a tile reads them.
#pragma once

#include "problem.hpp"
#include "tile.hpp"

namespace moesaic::MOESAIC_ISA {

template <class Kind>
using ElementOf = typename Kind::Element;

template <class Kind>
INLINE const ElementOf<Kind> *element(const moesaic_matrix &m, int64_t row, int64_t column) {
  return static_cast<const ElementOf<Kind> *>(m.data) + row * m.row_stride + column * m.column_stride;
}

// A vector of words of the columns from `p` on, of which `n` are there, and of those of the next row, `q`, if there is one.
template <class Kind>
INLINE Reg words_of_columns(const ElementOf<Kind> *p, const ElementOf<Kind> *q, int64_t column_stride, int64_t n) {
  if (column_stride == 1) return Kind::columns(p, q, n);
  ElementOf<Kind> a[kLanes], b[kLanes];
  const int64_t here = least<int64_t>(kLanes, n);
  for (int64_t i = 0; i < here; ++i) a[i] = p[i * column_stride];
  for (int64_t i = 0; q && i < here; ++i) b[i] = q[i * column_stride];
  return Kind::columns(a, q ? b : nullptr, here);
}

// The summed dim is that of the rows: `numbers[0..n)`, or `first..first + n`. Columns `column..column + width` of them
// become rows of words, zero up to the next whole vector.
template <class Kind>
static void pack_rows(const moesaic_matrix &m, const int64_t *numbers, int64_t first, int64_t n, int64_t column,
                      int64_t width, char *out, int64_t out_stride) {
  using Element = ElementOf<Kind>;
  for (int64_t r = 0; r < n; r += Kind::kStep, out += out_stride) {
    const bool has_second = r + 1 < n;
    const Element *p = element<Kind>(m, numbers ? numbers[r] : first + r, column);
    const Element *q = has_second ? element<Kind>(m, numbers ? numbers[r + 1] : first + r + 1, column) : nullptr;
    int64_t c = 0;
    if (m.column_stride == 1 && q) {
      for (; c + kPanel <= width; c += kPanel) {
        Reg words[kVectors];
        Kind::panel_row(p + c, q + c, words);
        for (int v = 0; v < kVectors; ++v) store(out + (c + v * kLanes) * kWord, words[v]);
      }
    }
    for (; c < width; c += kLanes) {
      const int64_t at = c * m.column_stride;
      store(out + c * kWord, words_of_columns<Kind>(p + at, q ? q + at : nullptr, m.column_stride, width - c));
    }
  }
}

// The same for a matrix whose columns are contiguous: the summed dim lies in order, so words are read whole. Columns
// are `numbers[column..]` where there are numbers.
template <class Kind>
static void pack_columns(const moesaic_matrix &m, const int64_t *numbers, int64_t first, int64_t n, int64_t column,
                         int64_t width, char *out) {
  const int64_t words = ceil_div(n, Kind::kStep);
  for (int64_t c = 0; c < width; c += kLanes) {
    for (int64_t w = 0; w < words; w += kLanes) {
      Reg square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t there = c + i < width ? n - w * Kind::kStep : 0;
        square[i] = zero();
        if (there > 0) {
          const int64_t at = numbers ? numbers[column + c + i] : column + c + i;
          square[i] = Kind::along(element<Kind>(m, first + w * Kind::kStep, at), there);
        }
      }
      transpose(square);
      const int64_t here = least<int64_t>(kLanes, words - w);
      for (int64_t i = 0; i < here; ++i) store(out + (w + i) * kPanelBytes + c * kWord, square[i]);
    }
  }
}

template <class Kind>
static void words_of_row(const moesaic_matrix &m, int64_t row, int64_t inner, void *out) {
  using Element = ElementOf<Kind>;
  const Element *p = element<Kind>(m, row, 0);
  float *words = static_cast<float *>(out);
  const int64_t count = ceil_div(inner, Kind::kStep);
  constexpr int64_t kElements = kLanes * Kind::kStep;
  for (int64_t w = 0, k = 0; w < count; w += kLanes, k += kElements) {
    const int64_t there = least<int64_t>(inner - k, kElements);
    if (m.column_stride == 1) {
      store_f32(words + w, Kind::along(p + k, there), count - w);
      continue;
    }
    Element gathered[kElements];
    for (int64_t i = 0; i < there; ++i) gathered[i] = p[(k + i) * m.column_stride];
    store_f32(words + w, Kind::along(gathered, there), count - w);
  }
}

}  // namespace moesaic::MOESAIC_ISA
