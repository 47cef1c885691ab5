// y^T = w[e]^T @ x^T, for groups of few rows whose weights lie with the summed dim contiguous.
//
// Packing such weights would turn every square of them over for a few rows' sake. Turned around, the rows of x are the
// panel, packed once, and each column of the weights is read word after word where it lies; what has to be turned over
// is the result, which is small. The order of every sum is that of the ordinary product.
#pragma once

namespace moesaic::MOESAIC_ISA {

constexpr int64_t kTurnedBytes = 512 << 10;        // of packed rows: they should stay in L2
constexpr int64_t kTurnedColumns = 16 * kHeight;   // columns between two turns of the result
constexpr int64_t kMaxTurnedPanels = 3 + kWideRows / kPanel;
constexpr int64_t kTurnedScratch = kTurnedBytes + kTurnedColumns * kMaxTurnedPanels * kPanelBytes;

// Rows in panels of nearly equal width.
struct RowPanels {
  int64_t vectors, count;
  explicit RowPanels(int64_t rows) : vectors(ceil_div(rows, kLanes)), count(ceil_div(vectors, kVectors)) {}
  int64_t begin(int64_t i) const { return i * vectors / count * kLanes; }
};

template <class Kind>
INLINE bool takes_turn(const Product &p, const ProductTask &t) {
  return !Kind::kWidens && t.matrix >= 0 && t.rows > kFewRows && t.rows <= kWideRows && p.w.row_stride == 1 &&
         p.w.column_stride != 1 && p.inner % Kind::kStep == 0 &&
         p.inner / Kind::kStep * RowPanels(t.rows).count * kPanelBytes <= kTurnedBytes;
}

template <class Kind>
INLINE Ahead columns_region(const Product &p, const ProductTask &t, int64_t column) {
  constexpr int64_t kSize = sizeof(ElementOf<Kind>);
  return Ahead::region(element<Kind>(weight<Kind>(p, t.matrix), 0, column),
                       least<int64_t>(kHeight, t.column + t.columns - column), p.inner * kSize,
                       p.w.column_stride * kSize);
}

// Sums of columns `first..first + n` against one panel of rows become elements of y.
static void store_turned(const Product &p, const ProductTask &t, const float *sums, int64_t first, int64_t n,
                         int64_t row, int64_t rows) {
  const int64_t y_size = p.y_dtype == MOESAIC_BF16 ? 2 : 4;
  auto place = [&](int64_t r, int64_t c) __attribute__((always_inline)) {
    return static_cast<char *>(p.y) + ((t.first_row + row + r) * p.columns + first + c) * y_size;
  };
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t last = least<int64_t>(kLanes, rows - r);
    for (int64_t c = 0; c < n; c += kLanes) {
      const int64_t here = least<int64_t>(kLanes, n - c);
      // Stores leave in order, each waiting for its line: have those of the next square come to L1 meanwhile.
      for (int64_t i = 0; i < last; ++i) __builtin_prefetch(place(r + i, c + kLanes), 1);
      Reg square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = i < here ? load(sums + (c + i) * kPanel + r) : zero();
      transpose(square);
      for (int64_t i = 0; i < last; ++i) {
        if (p.y_dtype == MOESAIC_BF16) {
          store_bf16(reinterpret_cast<uint16_t *>(place(r + i, c)), square[i], here);
        } else {
          store_f32(reinterpret_cast<float *>(place(r + i, c)), square[i], here);
        }
      }
    }
  }
}

// `next` is the task after this one, if there is one.
template <class Kind>
static void turned_product(const Product &p, const ProductTask &t, const ProductTask *next, char *packed) {
  const int64_t words = p.inner / Kind::kStep;
  const moesaic_matrix w = weight<Kind>(p, t.matrix);
  const RowPanels panels(t.rows);
  const moesaic_matrix x = {words_of_x<Kind>(p, t.first_row, 0), 1, p.x.row_stride};
  float *sums = reinterpret_cast<float *>(packed + kTurnedBytes);
  for (int64_t i = 0; i < panels.count; ++i) {
    const int64_t row = panels.begin(i), end = least(t.rows, panels.begin(i + 1));
    pack_columns<F32>(x, 0, words, row, end - row, packed + i * words * kPanelBytes);
  }
  Tile tile;
  Ahead ahead, ahead_y;
  const int64_t y_size = p.y_dtype == MOESAIC_BF16 ? 2 : 4;
  tile.row_step = kWord;
  tile.ahead = &ahead;
  tile.ahead_rows = &ahead_y;
  tile.result = {nullptr, false, false, nullptr, 0, kPanel, false, false};
  const int64_t end = t.column + t.columns;
  for (int64_t first = t.column; first < end; first += kTurnedColumns) {
    const int64_t n = least(kTurnedColumns, end - first);
    // The result is stored all at once, and must not wait for its lines one by one.
    ahead_y = Ahead::region(static_cast<char *>(p.y) + (t.first_row * p.columns + first) * y_size, t.rows, n * y_size,
                            p.columns * y_size);
    ahead_y.spread(ceil_div(n, kHeight) * panels.count * (words / kUnroll));
    for (int64_t c = 0; c < n; c += kHeight) {
      const int height = static_cast<int>(least<int64_t>(kHeight, n - c));
      const int64_t below = first + c + kHeight;
      ahead = below < end                                  ? columns_region<Kind>(p, t, below)
              : next && takes_turn<Kind>(p, *next) ? columns_region<Kind>(p, *next, next->column)
                                                           : Ahead{};
      ahead.spread(panels.count * (words / kUnroll));
      for (int64_t i = 0; i < panels.count; ++i) {
        const int64_t row = panels.begin(i), width = least(t.rows, panels.begin(i + 1)) - row;
        tile.result.sums = sums + (i * kTurnedColumns + c) * kPanel;
        for (int64_t k = 0; k < words; k += t.block_words) {
          tile.words = least(t.block_words, words - k);
          tile.panel = packed + (i * words + k) * kPanelBytes;
          tile.result.first = k == 0;
          for (int j = 0; j < height; ++j) {
            tile.rows[j] = reinterpret_cast<const char *>(element<Kind>(w, k * Kind::kStep, first + c + j));
          }
          multiply_packed<Kind>(height, width, tile);
        }
      }
    }
    for (int64_t i = 0; i < panels.count; ++i) {
      const int64_t row = panels.begin(i), width = least(t.rows, panels.begin(i + 1)) - row;
      store_turned(p, t, sums + i * kTurnedColumns * kPanel, first, n, row, width);
    }
  }
}

}  // namespace moesaic::MOESAIC_ISA
