// A block of rows of the weight gradient on tiles: `gradient_block` of gradient.hpp, for more than a few rows.
//
// In both operands the summed dim is that of the rows. Rows of grad become panels, one of them while the one before it is
// multiplied; the columns of x have to become rows of words, by transposes of squares in registers, once for all panels.
#pragma once

#include "amx_strip.hpp"
#include "gradient.hpp"

namespace moesaic::MOESAIC_ISA {

constexpr int64_t kFewTileRows = kTileSide;  // of a group: for so few a tile is mostly padding
constexpr int64_t kTileGradientWords = 256;
constexpr int64_t kTileColumnBytes = (kTileGradientWords + kTileSide) * kWord;  // see kTileRowBytes
constexpr int64_t kGradientPanelBytes = kTileGradientWords * kPanelBytes;
constexpr int64_t kTileGradientScratch = (kGradientRows + kStripRows) * kTileColumnBytes + 2 * kGradientPanelBytes +
                                         kGradientRows * kGradientColumns * kWord;

// Columns `column..column + width` of the rows `numbers[0..n)`, or `first..first + n`, become rows of words, zero up to
// whole tiles.
template <class Kind>
static void pack_transposed(const moesaic_matrix &m, const int64_t *numbers, int64_t first, int64_t n, int64_t column,
                            int64_t width, char *out) {
  const int64_t words = whole_tiles(ceil_div(n, Kind::kStep));
  auto row = [&](int64_t r, int64_t c) __attribute__((always_inline)) {
    return r < n ? element<Kind>(m, numbers ? numbers[r] : first + r, column + c) : nullptr;
  };
  for (int64_t w = 0; w < words; w += kLanes) {
    for (int64_t c = 0; c < width; c += kLanes) {
      Reg square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t r = (w + i) * Kind::kStep;
        square[i] = r < n ? words_of_columns<Kind>(row(r, c), row(r + 1, c), m.column_stride, width - c) : zero();
      }
      transpose(square);
      const int64_t here = least<int64_t>(kLanes, width - c);
      for (int64_t i = 0; i < here; ++i) store(out + (c + i) * kTileColumnBytes + w * kWord, square[i]);
    }
  }
}

// `next` is the block that comes after this one.
template <class Kind>
static void tile_gradient_block(TilesOf<Kind> &tiles, const Gradient &g, const RowBlock &b, const RowBlock &next,
                                char *memory) {
  char *const packed_x = memory, *const packed_grad = memory + (kGradientRows + kStripRows) * kTileColumnBytes;
  float *const all_sums = reinterpret_cast<float *>(packed_grad + 2 * kGradientPanelBytes);
  const bool is_bf16 = g.gw_dtype == MOESAIC_BF16;
  const int64_t size = is_bf16 ? 2 : 4;
  const GradientTask &t = *b.task;
  const int64_t row = g.first_row[t.matrix] + b.first, n = rows_in<Kind>(g, b), words = ceil_div(n, Kind::kStep);
  const bool last = row + n == g.first_row[t.matrix + 1];
  const int64_t panels = ceil_div(t.columns, kPanel);
  auto width_of = [&](int64_t panel) { return least<int64_t>(kPanel, t.columns - panel * kPanel); };
  auto packing_of = [&](int64_t panel) {
    return Packing<Kind>(g.grad, g.grad_rows ? g.grad_rows + row : nullptr, row, n, t.column + panel * kPanel,
                         width_of(panel), packed_grad + panel % 2 * kGradientPanelBytes);
  };
  pack_transposed<Kind>(g.x, g.x_rows ? g.x_rows + row : nullptr, row, n, t.row, t.rows, packed_x);
  packing_of(0).finish();
  Ahead after;  // of x, of which all is needed first
  if (next.task) after = rows_region<Kind>(g, g.x, g.x_rows, next, next.task->row, next.task->rows);
  after.spread(panels * steps_of(t.rows, kPanel, words));
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t column = t.column + panel * kPanel, width = width_of(panel);
    Meanwhile<Kind> meanwhile;
    if (panel + 1 < panels) meanwhile.packing = packing_of(panel + 1);
    meanwhile.packing.spread(steps_of(t.rows, width, words));
    meanwhile.ahead = after;
    for (int64_t r = 0; r < t.rows; r += kStripRows) {
      const int64_t height = least<int64_t>(kStripRows, t.rows - r);
      float *sums = all_sums + (panel * kGradientRows + r) * kPanel;
      multiply_strip<Kind>(tiles, {packed_x + r * kTileColumnBytes, kTileColumnBytes}, height,
                           packed_grad + panel % 2 * kGradientPanelBytes, width, ceil_div(words, kTileSide), sums,
                           b.first == 0, meanwhile);
      if (!last) continue;
      finish_strip({.sums = sums,
                    .y = static_cast<char *>(g.gw) + ((t.matrix * g.inner + t.row + r) * g.columns + column) * size,
                    .row_bytes = g.columns * size,
                    .columns = width,
                    .is_bf16 = is_bf16,
                    .around_caches = g.stream && width == kPanel,
                    .adds = g.adds},
                   height);
    }
    after = meanwhile.ahead;
    meanwhile.packing.finish();
  }
}

}  // namespace moesaic::MOESAIC_ISA
