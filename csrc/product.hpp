// y = x @ w[e]: a task is rows of one group against a panel of columns.
//
// The panel is packed once, a block of the summed dim at a time, and serves all rows of the task. Where columns are
// adjacent in memory the uppermost tile packs it on the way; while tiles multiply, the next block is brought in.
#pragma once

namespace moesaic::MOESAIC_ISA {

struct Block {
  int64_t first, count;  // elements of the summed dim
};

template <class Kind>
INLINE int64_t num_blocks(const Product &p, const ProductTask &t) {
  return ceil_div(p.inner, t.block_words * Kind::kStep);
}

template <class Kind>
INLINE Block block(const Product &p, const ProductTask &t, int64_t i) {
  const int64_t count = t.block_words * Kind::kStep, first = i * count;
  return {first, least(count, p.inner - first)};
}

template <class Kind>
INLINE moesaic_matrix weight(const Product &p, int64_t matrix) {
  return {static_cast<const ElementOf<Kind> *>(p.w.data) + matrix * p.w_stride, p.w.row_stride, p.w.column_stride};
}

// Whether the rows are so few that packing would cost more than it saves, and the summed dim is contiguous.
INLINE bool takes_dots(const Product &p, const ProductTask &t) {
  return t.rows <= kFewRows && t.columns <= kPanel && p.w.row_stride == 1 && p.w.column_stride != 1;
}

template <class Kind>
static Ahead weight_region(const Product &p, const ProductTask &t, int64_t index) {
  if (t.matrix < 0 || takes_dots(p, t)) return {};
  constexpr int64_t kSize = sizeof(ElementOf<Kind>);
  const moesaic_matrix w = weight<Kind>(p, t.matrix);
  const Block b = block<Kind>(p, t, index);
  const int64_t width = t.columns;
  const void *start = element<Kind>(w, b.first, t.column);
  if (w.column_stride == 1) return Ahead::region(start, b.count, width * kSize, w.row_stride * kSize);
  if (w.row_stride == 1) return Ahead::region(start, width, b.count * kSize, w.column_stride * kSize);
  return {};
}

template <class Kind, int ROWS>
static void dots(const Product &p, const ProductTask &t) {
  constexpr int kAtOnce = 4;
  const moesaic_matrix w = weight<Kind>(p, t.matrix);
  const int64_t words = ceil_div(p.inner, Kind::kStep);
  const int64_t width = t.columns;  // one panel
  const char *x = static_cast<const char *>(p.x.data) + t.first_row * p.x.row_stride * kWord;
  float sums[ROWS][kPanel];
  for (int64_t c = 0; c < width; c += kAtOnce) {
    Reg sum[kAtOnce][ROWS];
    const ElementOf<Kind> *columns[kAtOnce];
#pragma GCC unroll 4
    for (int j = 0; j < kAtOnce; ++j) {
      columns[j] = element<Kind>(w, 0, t.column + least<int64_t>(c + j, width - 1));
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) sum[j][i] = zero();
    }
    auto step = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
      Reg a[ROWS];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        a[i] = load_f32(reinterpret_cast<const float *>(x + (i * p.x.row_stride + k) * kWord), words - k);
      }
#pragma GCC unroll 4
      for (int j = 0; j < kAtOnce; ++j) {
        const Reg b = Kind::along(columns[j] + k * Kind::kStep, n);
        _mm_prefetch(columns[j] + k * Kind::kStep + kAtOnce * w.column_stride, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) sum[j][i] = Kind::fma(sum[j][i], a[i], b);
      }
    };
    for (int64_t k = 0; k < words; k += kLanes) step(k, p.inner - k * Kind::kStep);
    for (int j = 0; j < kAtOnce && c + j < width; ++j)
      for (int i = 0; i < ROWS; ++i) sums[i][c + j] = total(sum[j][i]);
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t at = (t.first_row + i) * p.columns + t.column + c;
      const Reg v = load_f32(sums[i] + c, width - c);
      if (p.y_dtype == MOESAIC_BF16) {
        store_bf16(static_cast<uint16_t *>(p.y) + at, v, width - c);
      } else {
        store_f32(static_cast<float *>(p.y) + at, v, width - c);
      }
    }
  }
}

template <class Kind>
INLINE const char *words_of_x(const Product &p, int64_t row, int64_t k) {
  return static_cast<const char *>(p.x.data) + (row * p.x.row_stride + k / Kind::kStep) * kWord;
}

// One panel and block of the summed dim: leaves the panel in `packed` where more than one tile needs it.
template <class Kind>
static void multiply_panel(const Product &p, const ProductTask &t, int64_t column, const Block &b, Tile &tile,
                           char *packed, float *sums) {
  const int64_t y_size = p.y_dtype == MOESAIC_BF16 ? 2 : 4;
  const moesaic_matrix w = weight<Kind>(p, t.matrix);
  const int64_t width = least<int64_t>(kPanel, t.column + t.columns - column);
  const Strips strips(t.rows);
  tile.result.columns = width;
  const bool in_place = w.column_stride == 1 && width == kPanel && b.count % Kind::kStep == 0;
  if (!in_place) {
    if (w.row_stride == 1 && w.column_stride != 1) {
      pack_columns<Kind>(w, b.first, b.count, column, width, packed);
    } else {
      pack_rows<Kind>(w, nullptr, b.first, b.count, column, width, packed, kPanelBytes);
    }
  }
  for (int64_t s = 0; s < strips.count; ++s) {
    const int64_t r = strips.begin(s);
    const int rows = static_cast<int>(strips.begin(s + 1) - r);
    for (int i = 0; i < rows; ++i) tile.rows[i] = words_of_x<Kind>(p, t.first_row + r + i, b.first);
    Ahead below;
    if (column == t.column && s + 1 < strips.count) {
      below = Ahead::region(words_of_x<Kind>(p, t.first_row + strips.begin(s + 1), b.first), kHeight - 1,
                            tile.words * kWord, p.x.row_stride * kWord);
      below.spread(tile.words / kUnroll);
    }
    tile.ahead_rows = &below;
    tile.result.y = static_cast<char *>(p.y) + ((t.first_row + r) * p.columns + column) * y_size;
    tile.result.sums = sums + r * kPanel;
    if (in_place && s == 0) {
      tile.panel = reinterpret_cast<const char *>(element<Kind>(w, b.first, column));
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
static void multiply_block(const Product &p, const ProductTask &t, int64_t index, Ahead ahead, char *packed,
                           float *sums) {
  const bool is_bf16 = p.y_dtype == MOESAIC_BF16;
  const Block b = block<Kind>(p, t, index);
  Tile tile;
  tile.row_step = kWord;
  tile.words = ceil_div(b.count, Kind::kStep);
  tile.packed = packed;
  tile.panel_stride = p.w.row_stride;
  tile.ahead = &ahead;
  ahead.spread(Strips(t.rows).count * ceil_div(t.columns, kPanel) * (tile.words / kUnroll));
  tile.result = {nullptr, index == 0, index + 1 == num_blocks<Kind>(p, t), nullptr, p.columns * (is_bf16 ? 2 : 4), 0,
                 is_bf16, false};
  for (int64_t c = 0; c < t.columns; c += kPanel) {
    multiply_panel<Kind>(p, t, t.column + c, b, tile, packed, sums + c * t.rows);
  }
}

}  // namespace moesaic::MOESAIC_ISA
