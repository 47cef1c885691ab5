// A task of a product on tiles: `product_task` of product_tasks.hpp, for more rows than a vector tile has.
//
// Where columns of the weights are adjacent in memory a panel of them is packed, while the tiles multiply the one before
// it. Where the summed dim is, columns of the weights are rows of words as they lie: then the rows of x are packed into
// panels, once a task, and the result is transposed. Either way a row of words is read in place if it is whole tiles.
// Sums have the same order in both, so a task's layout changes no bits.
#pragma once

#include "amx_strip.hpp"
#include "transposed.hpp"

namespace moesaic::MOESAIC_ISA {

constexpr int64_t kTileBlockWords = 512;
// Not a multiple of a page's size, so that rows do not all fall into one set of the cache.
constexpr int64_t kTileRowBytes = (kTileBlockWords + kTileSide) * kWord;
constexpr int64_t kTilePanelBytes = kTileBlockWords * kPanelBytes;
constexpr int64_t kTilePanels = kTileTaskRows / kPanel;  // of the rows of a task
constexpr int64_t kTileSums = kTileTaskRows * kWidePanels * kPanelBytes;
constexpr int64_t kTileScratch = 2 * kTilePanelBytes + (kTileTaskRows + kTileSide) * kTileRowBytes + kTileSums +
                                 kTilePanels * kTilePanelBytes;
static_assert(kTileTaskRows % kPanel == 0 && kTileBlockWords % kTileSide == 0);

struct TileScratch {
  char *panels[2], *rows;
  float *sums;
  char *packed_x;

  explicit TileScratch(char *memory)
      : panels{memory, memory + kTilePanelBytes},
        rows(memory + 2 * kTilePanelBytes),
        sums(reinterpret_cast<float *>(rows + (kTileTaskRows + kTileSide) * kTileRowBytes)),
        packed_x(reinterpret_cast<char *>(sums) + kTileSums) {}
};

// `count` rows of so many bytes, by number from `base`: as they are, or copied and filled up to whole tiles.
class RowsInTiles {
 public:
  RowsInTiles(const char *base, int64_t stride, const int64_t *numbers, int64_t count, int64_t bytes, char *packed)
      : in_place_{base, stride}, packed_{packed, kTileRowBytes} {
    constexpr int64_t kTileBytes = kTileSide * kWord;
    const int64_t whole_bytes = ceil_div(bytes, kTileBytes) * kTileBytes;
    whole_ = !numbers && bytes == whole_bytes ? count / kTileSide * kTileSide : 0;
    if (whole_ % kStripRows && whole_ < count) whole_ -= kTileSide;  // a strip is all in one place
    for (int64_t r = whole_; r < count; ++r) {
      char *to = packed + r * kTileRowBytes;
      __builtin_memcpy(to, base + (numbers ? numbers[r] : r) * stride, bytes);
      __builtin_memset(to + bytes, 0, whole_bytes - bytes);
    }
  }
  // From row `r` on, the beginning of a strip.
  TileRows from(int64_t r) const {
    const TileRows &rows = r < whole_ ? in_place_ : packed_;
    return {rows.data + r * rows.stride, rows.stride};
  }

 private:
  TileRows in_place_, packed_;
  int64_t whole_;
};

// Panel `i` of a task, all of them of its first block of the summed dim and then of the next.
template <class Kind>
struct PanelOfTask {
  Block block;
  int64_t column, width;  // within the task
  moesaic_matrix w;

  PanelOfTask(const Product &p, const ProductTask &t, int64_t i)
      : block(moesaic::MOESAIC_ISA::block<Kind>(p, t, i / ceil_div(t.columns, kPanel))),
        column(i % ceil_div(t.columns, kPanel) * kPanel),
        width(least<int64_t>(kPanel, t.columns - column)),
        w(weight<Kind>(p.terms[block.term], t.matrix)) {}

  Packing<Kind> packing(const ProductTask &t, char *out) const {
    return {w, nullptr, block.first, block.count, t.column + column, width, out};
  }
  Ahead region(const ProductTask &t) const {
    constexpr int64_t kSize = sizeof(ElementOf<Kind>);
    if (w.column_stride != 1) return {};
    return Ahead::region(element<Kind>(w, block.first, t.column + column), block.count, width * kSize,
                         w.row_stride * kSize);
  }
};

// Whether tiles multiply a task. `dots` and single vector tiles read the weights of a few rows as fast as memory gives.
INLINE bool takes_tiles(const ProductTask &t) { return t.rows > kHeight; }

// Whether columns of the weights are rows of words as they lie.
INLINE bool columns_are_rows(const Product &p) {
  for (int i = 0; i < p.num_terms; ++i) {
    if (p.terms[i].w.row_stride != 1 || p.terms[i].w.column_stride == 1) return false;
  }
  return true;
}

// `next` of `next_product` is the task after this one, if there is one.
template <class Kind>
static void tile_product(TilesOf<Kind> &tiles, const Product &p, const ProductTask &t, const Product &next_product,
                         const ProductTask *next, float *keep, const TileScratch &scratch) {
  const Place out = place(p, t, keep);
  const int64_t panels = ceil_div(t.columns, kPanel), blocks = num_blocks<Kind>(p, t), count = panels * blocks;
  float *sums = keep ? keep : scratch.sums;
  auto first_panel = PanelOfTask<Kind>(p, t, 0).packing(t, scratch.panels[0]);
  first_panel.finish();
  for (int64_t b = 0, i = 0; b < blocks; ++b) {
    const Block block = moesaic::MOESAIC_ISA::block<Kind>(p, t, b);
    const Term &term = p.terms[block.term];
    const int64_t words = ceil_div(block.count, Kind::kStep);
    const RowsInTiles rows(words_of_x<Kind>(term, p.x_rows ? 0 : t.first_row, block.first), term.x.row_stride * kWord,
                           p.x_rows ? p.x_rows + t.first_row : nullptr, t.rows, words * kWord, scratch.rows);
    for (int64_t panel = 0; panel < panels; ++panel, ++i) {
      const int64_t column = panel * kPanel, width = least<int64_t>(kPanel, t.columns - column);
      Meanwhile<Kind> meanwhile;
      if (i + 1 < count) meanwhile.packing = PanelOfTask<Kind>(p, t, i + 1).packing(t, scratch.panels[(i + 1) % 2]);
      if (i + 2 < count) {
        meanwhile.ahead = PanelOfTask<Kind>(p, t, i + 2).region(t);
      } else if (next && takes_tiles(*next) && next->matrix >= 0) {
        meanwhile.ahead = PanelOfTask<Kind>(next_product, *next, 0).region(*next);
      }
      meanwhile.spread(steps_of(t.rows, width, words));
      float *sums_of_panel = sums + column * t.rows;
      for (int64_t r = 0; r < t.rows; r += kStripRows) {
        const int64_t height = least<int64_t>(kStripRows, t.rows - r);
        multiply_strip<Kind>(tiles, rows.from(r), height, scratch.panels[i % 2], width, ceil_div(words, kTileSide),
                             sums_of_panel + r * kPanel, b == 0, meanwhile);
        if (out.kept || b + 1 < blocks) continue;
        finish_strip({.sums = sums_of_panel + r * kPanel,
                      .y = Place::at(out, r, column),
                      .row_bytes = out.row_bytes,
                      .columns = width,
                      .is_bf16 = out.is_bf16},
                     height);
      }
      meanwhile.packing.finish();
    }
  }
}

// The columns of a strip, to be brought in while the strip before it is multiplied.
template <class Kind>
static Ahead columns_of_strip(const Product &p, const ProductTask &t, const Block &block, int64_t column) {
  constexpr int64_t kSize = sizeof(ElementOf<Kind>);
  const moesaic_matrix w = weight<Kind>(p.terms[block.term], t.matrix);
  return Ahead::region(element<Kind>(w, block.first, t.column + column), least<int64_t>(kStripRows, t.columns - column),
                       block.count * kSize, w.column_stride * kSize);
}

template <class Kind>
static void transposed_tile_product(TilesOf<Kind> &tiles, const Product &p, const ProductTask &t, const Place &out,
                                    const TileScratch &scratch) {
  const int64_t blocks = num_blocks<Kind>(p, t), panels = ceil_div(t.rows, kPanel);
  for (int64_t b = 0; b < blocks; ++b) {
    const Block block = moesaic::MOESAIC_ISA::block<Kind>(p, t, b);
    const Term &term = p.terms[block.term];
    const int64_t words = ceil_div(block.count, Kind::kStep);
    const int64_t *numbers = p.x_rows ? p.x_rows + t.first_row : nullptr;
    const moesaic_matrix x = {words_of_x<Kind>(term, numbers ? 0 : t.first_row, block.first), 1, term.x.row_stride};
    for (int64_t i = 0; i < panels; ++i) {
      char *packed = scratch.packed_x + i * kTilePanelBytes;
      pack_columns<F32>(x, numbers, 0, words, i * kPanel, least<int64_t>(kPanel, t.rows - i * kPanel), packed);
      end_panel(packed, words);
    }
    const moesaic_matrix w = weight<Kind>(term, t.matrix);
    constexpr int64_t kSize = sizeof(ElementOf<Kind>);
    for (int64_t c = 0; c < t.columns; c += kStripRows) {
      const int64_t width = least<int64_t>(kStripRows, t.columns - c);
      const RowsInTiles columns(reinterpret_cast<const char *>(element<Kind>(w, block.first, t.column + c)),
                                w.column_stride * kSize, nullptr, width, block.count * kSize, scratch.rows);
      Meanwhile<Kind> meanwhile;
      if (c + kStripRows < t.columns) meanwhile.ahead = columns_of_strip<Kind>(p, t, block, c + kStripRows);
      meanwhile.spread(steps_of(width, kPanel, words) * panels);
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t row = i * kPanel, height = least<int64_t>(kPanel, t.rows - row);
        float *sums = scratch.sums + (i * t.columns + c) * kPanel;
        multiply_strip<Kind>(tiles, columns.from(0), width, scratch.packed_x + i * kTilePanelBytes, height,
                             ceil_div(words, kTileSide), sums, b == 0, meanwhile);
        if (b + 1 == blocks) store_transposed(out, sums, c, width, row, height);
      }
    }
  }
}

template <class Kind>
static void tile_product_task(TilesOf<Kind> &tiles, const Product &p, const ProductTask &t, const Product &next_product,
                              const ProductTask *next, float *keep, char *memory) {
  const TileScratch scratch(memory);
  if (columns_are_rows(p)) return transposed_tile_product<Kind>(tiles, p, t, place(p, t, keep), scratch);
  tile_product<Kind>(tiles, p, t, next_product, next, keep, scratch);
}

}  // namespace moesaic::MOESAIC_ISA
