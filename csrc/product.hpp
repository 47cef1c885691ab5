// y = x @ w[e], or a sum of two such products: a task is rows of one group against a panel of columns.
//
// The panel is packed once, a block of the summed dim at a time, and serves all rows of the task. Where columns are
// adjacent in memory the uppermost tile packs it on the way; while tiles multiply, the next block is brought in. Rows
// of x are read where they lie, so that gathering them costs nothing.
#pragma once

#include "pack.hpp"

namespace moesaic::MOESAIC_ISA {

struct Block {
  int64_t term;
  int64_t first, count;  // elements of the summed dim
};

template <class Kind>
INLINE int64_t num_blocks(const Product &p, const ProductTask &t) {
  return p.num_terms * ceil_div(p.inner, t.block_words * Kind::kStep);
}

template <class Kind>
INLINE Block block(const Product &p, const ProductTask &t, int64_t i) {
  const int64_t count = t.block_words * Kind::kStep, blocks = ceil_div(p.inner, count);
  const int64_t first = i % blocks * count;
  return {i / blocks, first, least(count, p.inner - first)};
}

template <class Kind>
INLINE moesaic_matrix weight(const Term &term, int64_t matrix) {
  return {static_cast<const ElementOf<Kind> *>(term.w.data) + matrix * term.w_stride, term.w.row_stride,
          term.w.column_stride};
}

// Where the sums of a task go: to the result, or, kept, panel after panel of fp32.
struct Place {
  char *data;
  int64_t row_bytes, panel_bytes;
  bool is_bf16, kept;

  INLINE char *at(const Place &p, int64_t row, int64_t column) {
    return p.data + row * p.row_bytes + column / kPanel * p.panel_bytes + column % kPanel * (p.is_bf16 ? 2 : 4);
  }

  // A vector of sums from there on, of which `n` are there.
  INLINE void put(const Place &p, int64_t row, int64_t column, Reg v, int64_t n) {
    char *to = at(p, row, column);
    if (p.is_bf16) {
      store_bf16(reinterpret_cast<uint16_t *>(to), v, n);
    } else {
      store_f32(reinterpret_cast<float *>(to), v, n);
    }
  }
};

INLINE Place place(const Product &p, const ProductTask &t, float *keep) {
  if (keep) {
    return {.data = reinterpret_cast<char *>(keep),
            .row_bytes = kPanelBytes,
            .panel_bytes = t.rows * kPanelBytes,
            .is_bf16 = false,
            .kept = true};
  }
  const bool is_bf16 = p.y_dtype == MOESAIC_BF16;
  const int64_t size = is_bf16 ? 2 : 4;
  return {.data = static_cast<char *>(p.y) + (t.first_row * p.columns + t.column) * size,
          .row_bytes = p.columns * size,
          .panel_bytes = kPanel * size,
          .is_bf16 = is_bf16,
          .kept = false};
}

INLINE int64_t row_of_x(const Product &p, int64_t row) { return p.x_rows ? p.x_rows[row] : row; }

template <class Kind>
INLINE const char *words_of_x(const Term &term, int64_t row, int64_t k) {
  return static_cast<const char *>(term.x.data) + (row * term.x.row_stride + k / Kind::kStep) * kWord;
}

// Whether a task's rows are so few that their weights are read in several places at once, and all its weights lie alike,
// in rows or in columns.
INLINE bool takes_places(const Product &p, const ProductTask &t) {
  const moesaic_matrix &a = p.terms[0].w, &b = p.terms[p.num_terms - 1].w;
  const bool in_rows = a.column_stride == 1 && b.column_stride == 1;
  return t.rows <= kHeight && (in_rows || (a.row_stride == 1 && b.row_stride == 1));
}

template <class Kind>
static Ahead weight_region(const Product &p, const ProductTask &t, int64_t index) {
  if (t.matrix < 0 || !p.inner || takes_places(p, t)) return {};
  constexpr int64_t kSize = sizeof(ElementOf<Kind>);
  const Block b = block<Kind>(p, t, index);
  const moesaic_matrix w = weight<Kind>(p.terms[b.term], t.matrix);
  const int64_t width = t.columns;
  const void *start = element<Kind>(w, b.first, t.column);
  if (w.column_stride == 1) return Ahead::region(start, b.count, width * kSize, w.row_stride * kSize);
  if (w.row_stride == 1) return Ahead::region(start, width, b.count * kSize, w.column_stride * kSize);
  return {};
}

// The rows of x of a strip, to be brought in while the one above multiplies.
template <class Kind>
INLINE Ahead rows_of_strip(const Product &p, const Term &term, int64_t row, int64_t rows, const Block &b,
                           int64_t words) {
  const int64_t bytes = words * kWord, stride = term.x.row_stride * kWord;
  if (p.x_rows) return Ahead::region(words_of_x<Kind>(term, 0, b.first), rows, bytes, stride, p.x_rows + row);
  return Ahead::region(words_of_x<Kind>(term, row, b.first), rows, bytes, stride);
}

// One panel and block of the summed dim: leaves the panel in `packed` where more than one tile needs it.
template <class Kind>
static void multiply_panel(const Product &p, const ProductTask &t, int64_t column, const Block &b, Tile &tile,
                           const Place &out, char *packed, float *sums) {
  const Term &term = p.terms[b.term];
  const moesaic_matrix w = weight<Kind>(term, t.matrix);
  const int64_t width = least<int64_t>(kPanel, t.columns - column);
  const Strips strips(t.rows);
  tile.result.columns = width;
  tile.panel_stride = w.row_stride;
  const bool in_place = w.column_stride == 1 && width == kPanel && b.count % Kind::kStep == 0;
  if (!in_place) {
    if (w.row_stride == 1 && w.column_stride != 1) {
      pack_columns<Kind>(w, nullptr, b.first, b.count, t.column + column, width, packed);
    } else {
      pack_rows<Kind>(w, nullptr, b.first, b.count, t.column + column, width, packed, kPanelBytes);
    }
  }
  for (int64_t s = 0; s < strips.count; ++s) {
    const int64_t r = strips.begin(s);
    const int rows = static_cast<int>(strips.begin(s + 1) - r);
    for (int i = 0; i < rows; ++i) tile.rows[i] = words_of_x<Kind>(term, row_of_x(p, t.first_row + r + i), b.first);
    Ahead below;
    if (kBringsRows && column == 0 && s + 1 < strips.count) {
      const int64_t next = strips.begin(s + 1), end = strips.begin(s + 2);
      below = rows_of_strip<Kind>(p, term, t.first_row + next, end - next, b, tile.words);
      below.spread(tile.words / kUnroll);
    }
    tile.ahead_rows = &below;
    tile.result.y = Place::at(out, r, column);
    tile.result.sums = sums + r * kPanel;
    if (in_place && s == 0) {
      tile.panel = reinterpret_cast<const char *>(element<Kind>(w, b.first, t.column + column));
      if (strips.count == 1) {
        by_rows<Kind, kVectors, Source::kInPlace>(rows, tile);
      } else {
        by_rows<Kind, kVectors, Source::kPackedHere>(rows, tile);
      }
    } else {
      tile.panel = packed;
      multiply_packed<Kind>(rows, width, tile);
    }
  }
}

// One block of the summed dim. `ahead` is the block that follows.
template <class Kind>
static void multiply_block(const Product &p, const ProductTask &t, int64_t index, Ahead ahead, const Place &out,
                           char *packed, float *sums) {
  const Block b = block<Kind>(p, t, index);
  Tile tile;
  tile.row_step = kWord;
  tile.words = ceil_div(b.count, Kind::kStep);
  tile.packed = packed;
  tile.ahead = &ahead;
  ahead.spread(Strips(t.rows).count * ceil_div(t.columns, kPanel) * (tile.words / kUnroll));
  tile.result = {.first = index == 0,
                 .last = !out.kept && index + 1 == num_blocks<Kind>(p, t),
                 .row_bytes = out.row_bytes,
                 .is_bf16 = out.is_bf16};
  for (int64_t c = 0; c < t.columns; c += kPanel) {
    multiply_panel<Kind>(p, t, c, b, tile, out, packed, sums + c * t.rows);
  }
}

}  // namespace moesaic::MOESAIC_ISA
