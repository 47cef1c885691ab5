// y^T = w[e]^T @ x^T, for groups of few rows whose weights lie with the summed dim contiguous.
//
// Packing such weights would transpose all of them for the sake of a few rows. Here the rows of x are the panel, packed
// once, and each column of the weights is read where it lies, word after word, or converted to words just before. Only the result has to be transposed, and
// that is small. The order of every sum is that of the ordinary product.
#pragma once

#include "product.hpp"

namespace moesaic::MOESAIC_ISA {

constexpr int64_t kTransposedBytes = 512 << 10;        // of packed rows: they should stay in L2
constexpr int64_t kTransposedColumns = 16 * kHeight;   // columns whose results are transposed at a time
constexpr int64_t kMaxTransposedPanels = 3 + kWideRows / kPanel;
constexpr int64_t kTransposedSums = kTransposedColumns * kMaxTransposedPanels * kPanelBytes;
// Where elements are converted to words, those of the columns of one tile.
template <class Kind>
constexpr int64_t kTransposedScratch = kTransposedBytes + kTransposedSums +
                                       (Kind::kWidens ? kHeight * kProductWords<Kind> * kWord : 0);
static_assert(kTransposedColumns % kLanes == 0, "a vector of columns lies in one panel");

// Rows in panels of nearly equal width.
struct RowPanels {
  int64_t vectors, count;
  explicit RowPanels(int64_t rows) : vectors(ceil_div(rows, kLanes)), count(ceil_div(vectors, kVectors)) {}
  int64_t begin(int64_t i) const { return i * vectors / count * kLanes; }
};

template <class Kind>
INLINE bool takes_transposed(const Product &p, const ProductTask &t) {
  const moesaic_matrix &a = p.terms[0].w, &b = p.terms[p.num_terms - 1].w;
  return t.matrix >= 0 && t.rows > kHeight && t.rows <= kWideRows && a.row_stride == 1 &&
         a.column_stride != 1 && b.row_stride == 1 && b.column_stride != 1 && p.inner % Kind::kStep == 0 &&
         p.num_terms * p.inner / Kind::kStep * RowPanels(t.rows).count * kPanelBytes <= kTransposedBytes;
}

template <class Kind>
INLINE Ahead columns_region(const Product &p, int term, const ProductTask &t, int64_t column) {
  constexpr int64_t kSize = sizeof(ElementOf<Kind>);
  return Ahead::region(element<Kind>(weight<Kind>(p.terms[term], t.matrix), 0, t.column + column),
                       least<int64_t>(kHeight, t.columns - column), p.inner * kSize,
                       p.terms[term].w.column_stride * kSize);
}

// Sums of columns `first..first + n` of a task against one panel of its rows become elements of the result.
static void store_transposed(const Place &out, const float *sums, int64_t first, int64_t n, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t last = least<int64_t>(kLanes, rows - r);
    for (int64_t c = 0; c < n; c += kLanes) {
      const int64_t here = least<int64_t>(kLanes, n - c);
      // Stores leave in order, each waiting for its line: have those of the next square come to L1 meanwhile.
      for (int64_t i = 0; i < last && c + kLanes < n; ++i) {
        __builtin_prefetch(Place::at(out, row + r + i, first + c + kLanes), 1);
      }
      Reg square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = i < here ? load(sums + (c + i) * kPanel + r) : zero();
      transpose(square);
      for (int64_t i = 0; i < last; ++i) Place::put(out, row + r + i, first + c, square[i], here);
    }
  }
}

// `next` of `next_product` is the task after this one, if there is one.
template <class Kind>
static void transposed_product(const Product &p, const ProductTask &t, const Product &next_product,
                           const ProductTask *next, const Place &out, char *packed) {
  const int64_t words = p.inner / Kind::kStep;
  const RowPanels panels(t.rows);
  float *sums = reinterpret_cast<float *>(packed + kTransposedBytes);
  float *widened = reinterpret_cast<float *>(packed + kTransposedBytes + kTransposedSums);
  auto packed_panel = [&](int64_t term, int64_t i) __attribute__((always_inline)) {
    return packed + (term * panels.count + i) * words * kPanelBytes;
  };
  for (int term = 0; term < p.num_terms; ++term) {
    const int64_t *numbers = p.x_rows ? p.x_rows + t.first_row : nullptr;
    const moesaic_matrix x = {words_of_x<Kind>(p.terms[term], numbers ? 0 : t.first_row, 0), 1,
                              p.terms[term].x.row_stride};
    for (int64_t i = 0; i < panels.count; ++i) {
      const int64_t row = panels.begin(i), end = least(t.rows, panels.begin(i + 1));
      pack_columns<F32>(x, numbers, 0, words, row, end - row, packed_panel(term, i));
    }
  }
  Tile tile;
  Ahead ahead, ahead_y;
  tile.row_step = kWord;
  tile.ahead = &ahead;
  tile.ahead_rows = &ahead_y;
  tile.result = {.columns = kPanel};
  for (int64_t first = 0; first < t.columns; first += kTransposedColumns) {
    const int64_t n = least(kTransposedColumns, t.columns - first);
    if (!out.kept) {
      // The result is stored all at once, and must not wait for its lines one by one.
      ahead_y = Ahead::region(Place::at(out, 0, first), t.rows, n * (out.is_bf16 ? 2 : 4), out.row_bytes);
      ahead_y.spread(ceil_div(n, kHeight) * p.num_terms * panels.count * (words / kUnroll));
    }
    for (int64_t c = 0; c < n; c += kHeight) {
      const int height = static_cast<int>(least<int64_t>(kHeight, n - c));
      const int64_t below = first + c + kHeight;
      for (int term = 0; term < p.num_terms; ++term) {
        ahead = term + 1 < p.num_terms ? columns_region<Kind>(p, term + 1, t, first + c)
                : below < t.columns    ? columns_region<Kind>(p, 0, t, below)
                : next && takes_transposed<Kind>(next_product, *next) ? columns_region<Kind>(next_product, 0, *next, 0)
                                                                : Ahead{};
        ahead.spread(panels.count * (words / kUnroll));
        const moesaic_matrix w = weight<Kind>(p.terms[term], t.matrix);
        for (int64_t k = 0; k < words; k += t.block_words) {
          tile.words = least(t.block_words, words - k);
          tile.result.first = term == 0 && k == 0;
          for (int j = 0; j < height; ++j) {
            const ElementOf<Kind> *column = element<Kind>(w, k * Kind::kStep, t.column + first + c + j);
            if constexpr (Kind::kWidens) {
              float *to = widened + j * kProductWords<Kind>;
              for (int64_t i = 0; i < tile.words; i += kLanes) store(to + i, Kind::along(column + i, tile.words - i));
              tile.rows[j] = reinterpret_cast<const char *>(to);
            } else {
              tile.rows[j] = reinterpret_cast<const char *>(column);
            }
          }
          for (int64_t i = 0; i < panels.count; ++i) {
            const int64_t row = panels.begin(i), width = least(t.rows, panels.begin(i + 1)) - row;
            tile.panel = packed_panel(term, i) + k * kPanelBytes;
            tile.result.sums = sums + (i * kTransposedColumns + c) * kPanel;
            multiply_packed<Kind>(height, width, tile);
          }
        }
      }
    }
    for (int64_t i = 0; i < panels.count; ++i) {
      const int64_t row = panels.begin(i), width = least(t.rows, panels.begin(i + 1)) - row;
      store_transposed(out, sums + i * kTransposedColumns * kPanel, first, n, row, width);
    }
  }
}

}  // namespace moesaic::MOESAIC_ISA
