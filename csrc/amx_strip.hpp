// Up to 32 rows of one operand against a panel of the other, on tiles: what `multiply` of tile.hpp is on vectors.
//
// Words are pairs of bf16, so rows of words are rows of a tile, and 16 columns of a packed panel are a tile as well.
// Two tiles of rows meet two of the panel: four loads for four products, each of which takes the tile unit 16 cycles,
// and four sums, each of which waits for the one before it for about 52. The vector units are idle meanwhile, so the next
// panel is packed there, a few words at a time, and what comes after it is brought in.
#pragma once

#include "pack.hpp"

namespace moesaic::MOESAIC_ISA {

constexpr int kTileSide = 16;  // rows of a tile, and words of a row
constexpr int kStripRows = 2 * kTileSide;
static_assert(kPanel % kTileSide == 0, "a panel is whole tiles");

INLINE int64_t whole_tiles(int64_t n) { return ceil_div(n, kTileSide) * kTileSide; }

// Rows of words, a multiple of 16 of which can be read.
struct TileRows {
  const char *data = nullptr;
  int64_t stride = 0;
};

// The words of a panel end with zeros, up to whole tiles.
INLINE void end_panel(char *panel, int64_t words) {
  __builtin_memset(panel + words * kPanelBytes, 0, (whole_tiles(words) - words) * kPanelBytes);
}

// A panel that is packed in pieces: `pack_rows` of some words at a time.
template <class Kind>
class Packing {
 public:
  Packing() = default;
  Packing(const moesaic_matrix &m, const int64_t *numbers, int64_t first, int64_t count, int64_t column, int64_t width,
          char *out)
      : m_(m), numbers_(numbers), first_(first), count_(count), column_(column), width_(width), out_(out) {}

  // Over so many steps. A matrix whose rows are not contiguous is packed when all of it is needed.
  void spread(int64_t steps) {
    const int64_t words = ceil_div(count_, Kind::kStep);
    burst_ = m_.column_stride == 1 && steps > 0 ? ceil_div(words, steps) : 0;
  }

  INLINE void step(Packing &p) { p.pack(p.burst_); }

  // The rest.
  void finish() {
    if (!out_) return;
    const int64_t words = ceil_div(count_, Kind::kStep);
    if (!numbers_ && m_.row_stride == 1 && m_.column_stride != 1) {
      pack_columns<Kind>(m_, nullptr, first_, count_, column_, width_, out_);
    } else {
      pack(words);
    }
    end_panel(out_, words);
  }

 private:
  void pack(int64_t words) {
    const int64_t at = done_ * Kind::kStep, n = least(words * Kind::kStep, count_ - at);
    if (n <= 0) return;
    pack_rows<Kind>(m_, numbers_ ? numbers_ + at : nullptr, first_ + at, n, column_, width_, out_ + done_ * kPanelBytes,
                    kPanelBytes);
    done_ += words;
  }

  moesaic_matrix m_ = {};
  const int64_t *numbers_ = nullptr;
  int64_t first_ = 0, count_ = 0, column_ = 0, width_ = 0;
  char *out_ = nullptr;
  int64_t done_ = 0, burst_ = 0;  // words
};

// What the vector units do while tiles multiply.
template <class Kind>
struct Meanwhile {
  Packing<Kind> packing;
  Ahead ahead;

  void spread(int64_t steps) {
    packing.spread(steps);
    ahead.spread(steps);
  }
  INLINE void step(Meanwhile &m) {
    bring(m.ahead);
    Packing<Kind>::step(m.packing);
  }
};

// Steps of `multiply_strips` over `rows` rows, a panel of `columns` and `words` of the summed dim.
INLINE int64_t steps_of(int64_t rows, int64_t columns, int64_t words) {
  const int64_t whole = rows / kStripRows, left = rows % kStripRows, tiles = ceil_div(columns, kTileSide);
  const int64_t passes = (whole + (left > kTileSide)) * ceil_div(tiles, 2) + (left > 0 && left <= kTileSide);
  return passes * ceil_div(words, kTileSide);
}

// f<FROM>(), ..., f<TO - 1>().
template <int FROM, int TO, class F>
INLINE void each(const F &f) {
  if constexpr (FROM < TO) {
    f.template operator()<FROM>();
    each<FROM + 1, TO>(f);
  }
}

// ROWS x COLUMNS tiles of sums, of `chunks` tiles of the summed dim. Sums are rows of kPanel.
template <class Kind, int ROWS, int COLUMNS>
static void multiply_tiles(TilesOf<Kind> &tiles, const TileRows &rows, const char *panel, int64_t chunks, float *sums,
                           bool first, Meanwhile<Kind> &meanwhile) {
  constexpr int kA = ROWS * COLUMNS, kB = kA + ROWS, kTilesOfB = least(8 - kB, COLUMNS);
  constexpr int64_t kTileBytes = kTileSide * kWord;
  each<0, ROWS * COLUMNS>([&]<int T>() __attribute__((always_inline)) {
    if (first) {
      tiles.template zero<T>();
    } else {
      tiles.template load<T>(sums + (T / COLUMNS * kPanel + T % COLUMNS) * kTileSide, kPanelBytes);
    }
  });
  const char *a = rows.data;
  for (int64_t k = 0; k < chunks; ++k, a += kTileBytes, panel += kTileSide * kPanelBytes) {
    each<0, ROWS>([&]<int I>() __attribute__((always_inline)) {
      tiles.template load<kA + I>(a + I * kTileSide * rows.stride, rows.stride);
    });
    each<0, COLUMNS>([&]<int J>() __attribute__((always_inline)) {
      constexpr int kThis = kB + J % kTilesOfB;
      tiles.template load<kThis>(panel + J * kTileBytes, kPanelBytes);
      each<0, ROWS>([&]<int I>() __attribute__((always_inline)) {
        tiles.template add_product<I * COLUMNS + J, kA + I, kThis>();
      });
    });
    Meanwhile<Kind>::step(meanwhile);
  }
  each<0, ROWS * COLUMNS>([&]<int T>() __attribute__((always_inline)) {
    tiles.template store<T>(sums + (T / COLUMNS * kPanel + T % COLUMNS) * kTileSide, kPanelBytes);
  });
}

// `count` rows, at most 32, against `columns` of a packed panel.
template <class Kind>
static void multiply_strip(TilesOf<Kind> &tiles, const TileRows &rows, int64_t count, const char *panel,
                           int64_t columns, int64_t chunks, float *sums, bool first, Meanwhile<Kind> &meanwhile) {
  // Tiles are whole: the rows of the last one that are not there may not be written.
  alignas(64) float whole[kStripRows * kPanel];
  const bool is_whole = count % kTileSide == 0;
  float *to = is_whole ? sums : whole;
  if (!is_whole && !first) __builtin_memcpy(whole, sums, count * kPanelBytes);
  const int64_t columns_of_tiles = ceil_div(columns, kTileSide);
  if (count > kTileSide) {
    for (int64_t c = 0; c < columns_of_tiles; c += 2) {
      const char *from = panel + c * kTileSide * kWord;
      float *there = to + c * kTileSide;
      if (c + 1 < columns_of_tiles) {
        multiply_tiles<Kind, 2, 2>(tiles, rows, from, chunks, there, first, meanwhile);
      } else {
        multiply_tiles<Kind, 2, 1>(tiles, rows, from, chunks, there, first, meanwhile);
      }
    }
  } else {
    switch (columns_of_tiles) {
      case 1: multiply_tiles<Kind, 1, 1>(tiles, rows, panel, chunks, to, first, meanwhile); break;
      case 2: multiply_tiles<Kind, 1, 2>(tiles, rows, panel, chunks, to, first, meanwhile); break;
      case 3: multiply_tiles<Kind, 1, 3>(tiles, rows, panel, chunks, to, first, meanwhile); break;
      default: multiply_tiles<Kind, 1, 4>(tiles, rows, panel, chunks, to, first, meanwhile); break;
    }
  }
  if (!is_whole) __builtin_memcpy(sums, whole, count * kPanelBytes);
}

// Complete sums of `rows` rows become elements of the result.
static void finish_strip(const Result &result, int64_t rows) {
  Result row = result;
  row.first = false;
  row.last = true;
  for (int64_t r = 0; r < rows; ++r) {
    Reg nothing[1][kVectors];
    for (int v = 0; v < kVectors; ++v) nothing[0][v] = zero();
    finish<1, kVectors>(row, nothing);
    row.sums += kPanel;
    row.y += result.row_bytes;
  }
}

}  // namespace moesaic::MOESAIC_ISA
