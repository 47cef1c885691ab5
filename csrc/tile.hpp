// The register tile: up to 6 rows of one operand against a panel of the other, and where its sums go.
#pragma once

#include "vector.hpp"

namespace moesaic::MOESAIC_ISA {

constexpr int kPanel = kVectors * kLanes;
constexpr int64_t kWord = 4;
constexpr int64_t kPanelBytes = kPanel * kWord;

template <class T>
INLINE constexpr T least(T a, T b) {
  return b < a ? b : a;
}
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Words of the summed dim that are added up one after the other. Each such block is a sum of its own, and its length a
// compromise: sums pass through memory between blocks, a long fp32 sum loses digits, which in bf16 nobody sees, and the
// rows of a task should stay in L2 with a panel, as 768 rows of 256 words do in 1 MB.
template <class Kind>
constexpr int64_t kProductWords = sizeof(typename Kind::Element) == 4 || Kind::kWidens ? 256 : 512;
template <class Kind>
constexpr int64_t kGradientWords = sizeof(typename Kind::Element) == 4 ? 128 : 256;

// Kinds of elements that AMX multiplies name the class of its tiles, which lives as long as a thread works on a call.
struct NoTiles {};
template <class Kind>
constexpr bool kHasTiles = requires { typename Kind::Tiles; };
template <class Kind>
struct TilesOfKind {
  using Type = NoTiles;
};
template <class Kind>
  requires kHasTiles<Kind>
struct TilesOfKind<Kind> {
  using Type = typename Kind::Tiles;
};
template <class Kind>
using TilesOf = typename TilesOfKind<Kind>::Type;

// Memory that the next tile will read, brought in a few lines at a time while this one multiplies: a burst would
// stop the loads of the tile itself.
struct Ahead {
  const char *at = nullptr;
  const char *base = nullptr;
  const int64_t *numbers = nullptr;  // of the rows, from `base`; NULL: they follow each other
  int64_t stride = 0;                // bytes from row to row
  int64_t row_lines = 0, left_in_row = 0;
  int64_t row = 0;
  int64_t lines = 0;
  int64_t burst = 0;

  INLINE Ahead region(const void *data, int64_t rows, int64_t row_bytes, int64_t stride_bytes,
                      const int64_t *numbers = nullptr) {
    Ahead a;
    if (rows <= 0) return a;
    a.base = static_cast<const char *>(data);
    a.numbers = numbers;
    a.stride = stride_bytes;
    a.row_lines = a.left_in_row = ceil_div(row_bytes, 64);
    a.lines = rows * a.row_lines;
    a.at = a.base + (numbers ? numbers[0] * stride_bytes : 0);
    return a;
  }
  void spread(int64_t calls) { burst = calls > 0 ? ceil_div(lines, calls) : 0; }
};
constexpr int64_t kUnroll = 8;  // words between bursts

// Next to multiplications each instruction counts: a burst ends with its row. Where rows are shorter than bursts they
// nearly follow each other, and the processor brings in what this leaves out.
__attribute__((always_inline)) static inline void bring(Ahead &a) {
  if (a.lines <= 0) return;
  const int64_t n = least(a.burst, a.left_in_row);
  for (int64_t i = 0; i < n; ++i) _mm_prefetch(a.at + i * 64, _MM_HINT_T0);
  a.at += n * 64;
  a.lines -= n;
  a.left_in_row -= n;
  if (a.left_in_row == 0 && a.lines > 0) {
    ++a.row;
    a.at = a.base + (a.numbers ? a.numbers[a.row] : a.row) * a.stride;
    a.left_in_row = a.row_lines;
  }
}

// Where the sums of a tile go: to the result, or to `sums` until the last block of the summed dim has come.
struct Result {
  float *sums = nullptr;  // rows of kPanel
  bool first = false, last = false;
  char *y = nullptr;
  int64_t row_bytes = 0;
  int64_t columns = 0;
  bool is_bf16 = false;
  bool around_caches = false;  // whole, aligned lines only
  bool adds = false;           // to what is there
};

struct Tile {
  const char *rows[kHeight];
  int64_t row_step;  // bytes from word to word
  int64_t words;
  const char *panel;      // packed rows of kPanel words, or elements where they lie
  int64_t panel_stride;   // elements from row to row, where they lie
  char *packed;           // where to leave the packed panel
  Ahead *ahead, *ahead_rows;  // of the panel, and of the rows
  Result result;
};

enum class Source {
  kPacked,
  kInPlace,     // read where it lies, by a tile that alone needs it
  kPackedHere,  // read where it lies, and left packed for the tiles below
};

template <int ROWS, int VECTORS>
INLINE void finish(const Result &r, Reg (&sum)[ROWS][VECTORS]) {
  if (!r.first) {
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = add(sum[i][v], load(r.sums + i * kPanel + v * kLanes));
  }
  if (!r.last) {
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) store(r.sums + i * kPanel + v * kLanes, sum[i][v]);
    return;
  }
  char *y = r.y;
  if (r.adds) {
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t here = r.columns - v * kLanes;
        const char *there = r.y + i * r.row_bytes;
        sum[i][v] = add(sum[i][v], r.is_bf16 ? load_elements(reinterpret_cast<const uint16_t *>(there) + v * kLanes, here)
                                             : load_elements(reinterpret_cast<const float *>(there) + v * kLanes, here));
      }
  }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    if (r.is_bf16) {
      uint16_t *out = reinterpret_cast<uint16_t *>(y);
      if (VECTORS % 2 == 0 && r.around_caches) {
#pragma GCC unroll 2
        for (int v = 0; v + 1 < VECTORS; v += 2) stream_bf16(out + v * kLanes, sum[i][v], sum[i][v + 1]);
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store_bf16(out + v * kLanes, sum[i][v], r.columns - v * kLanes);
      }
    } else {
      float *out = reinterpret_cast<float *>(y);
      if (r.around_caches) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) stream(out + v * kLanes, sum[i][v]);
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store_f32(out + v * kLanes, sum[i][v], r.columns - v * kLanes);
      }
    }
    y += r.row_bytes;
  }
}

template <class Kind, int ROWS, int VECTORS, Source SOURCE>
__attribute__((noinline)) static void multiply(const Tile &t) {
  using Element = typename Kind::Element;
  Reg sum[ROWS][VECTORS];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = zero();

  const char *rows[ROWS];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) rows[i] = t.rows[i];
  // Stores leave in order, each waiting for its line: have those of the result come meanwhile.
  if (t.result.last && !t.result.around_caches) {
    const int64_t bytes = t.result.columns * (t.result.is_bf16 ? 2 : 4);
    for (int i = 0; i < ROWS; ++i) {
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(t.result.y + i * t.result.row_bytes + b, 1);
    }
  }
  const char *panel = t.panel;
  const int64_t stride = t.panel_stride;
  char *packed = t.packed;
  const int64_t step = t.row_step;
  int64_t at = 0;

  auto word = [&]() __attribute__((always_inline)) {
    Reg b[VECTORS];
    if constexpr (SOURCE == Source::kPacked) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) b[v] = load(panel + v * kLanes * kWord);
      panel += kPanelBytes;
    } else {
      const Element *p = reinterpret_cast<const Element *>(panel);
      Kind::panel_row(p, p + stride, b);
      panel = reinterpret_cast<const char *>(p + Kind::kStep * stride);
      if constexpr (SOURCE == Source::kPackedHere) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(packed + v * kLanes * kWord, b[v]);
        packed += kPanelBytes;
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      const Reg a = broadcast(rows[i] + at);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = Kind::fma(sum[i][v], a, b[v]);
    }
    at += step;
  };

  int64_t left = t.words;
  Ahead ahead = *t.ahead, ahead_rows = *t.ahead_rows;
  for (; left >= kUnroll; left -= kUnroll) {
    bring(ahead);
    bring(ahead_rows);
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) word();
  }
  for (; left > 0; --left) word();
  *t.ahead = ahead;
  finish<ROWS, VECTORS>(t.result, sum);
}

using Multiply = void (*)(const Tile &);

template <class Kind, int VECTORS, Source SOURCE>
static void by_rows(int rows, const Tile &t) {
  static constexpr Multiply kTable[kHeight] = {
      multiply<Kind, 1, VECTORS, SOURCE>, multiply<Kind, 2, VECTORS, SOURCE>, multiply<Kind, 3, VECTORS, SOURCE>,
      multiply<Kind, 4, VECTORS, SOURCE>, multiply<Kind, 5, VECTORS, SOURCE>, multiply<Kind, 6, VECTORS, SOURCE>,
  };
  kTable[rows - 1](t);
}

template <class Kind>
static void multiply_packed(int rows, int64_t columns, const Tile &t) {
  const int64_t vectors = ceil_div(columns, kLanes);
  if (vectors == 1) return by_rows<Kind, 1, Source::kPacked>(rows, t);
  if constexpr (kVectors == 4) {
    if (vectors == 2) return by_rows<Kind, 2, Source::kPacked>(rows, t);
    if (vectors == 3) return by_rows<Kind, 3, Source::kPacked>(rows, t);
  }
  by_rows<Kind, kVectors, Source::kPacked>(rows, t);
}

// Cuts rows into tiles of nearly equal height, so that none is left with a single row.
struct Strips {
  int64_t count, rows;
  explicit Strips(int64_t n) : count(ceil_div(n, kHeight)), rows(n) {}
  int64_t begin(int64_t i) const { return i * rows / count; }
};

}  // namespace moesaic::MOESAIC_ISA
