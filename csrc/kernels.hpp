// The table of one instruction set. Included once in each of the files that are compiled for one.
#pragma once

#include "experts.hpp"
#include "gradient_tasks.hpp"
#include "problem.hpp"
#ifdef MOESAIC_TILES
#include MOESAIC_TILES
#endif

namespace moesaic::MOESAIC_ISA {

template <class Kind>
static double spin(int64_t rounds) {
  constexpr int kChains = kHeight * kVectors;
  Reg sum[kChains];
  for (auto &s : sum) s = zero();
  Reg a = zero(), b = zero();
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+v"(a), "+v"(b));  // else the loop would be computed at once
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) sum[c] = Kind::fma(sum[c], a, b);
  }
  for (int c = 0; c < kChains; ++c) asm volatile("" ::"v"(sum[c]));
  return 2.0 * static_cast<double>(rounds) * kChains * kLanes * Kind::kStep;
}

#ifdef MOESAIC_TILES
struct TiledBF16 : PairsOfBF16 {
  using Tiles = MOESAIC_ISA::Tiles;
};

// One instruction: c [16, 16] += a [16, 16] @ b [16, 16] of words.
static void one_tile_product(const void *a, const void *b, float *c) {
  TilesOf<TiledBF16> tiles;
  tiles.load<0>(c, kTileSide * kWord);
  tiles.load<1>(a, kTileSide * kWord);
  tiles.load<2>(b, kTileSide * kWord);
  tiles.add_product<0, 1, 2>();
  tiles.store<0>(c, kTileSide * kWord);
}

template <>
double spin<TiledBF16>(int64_t rounds) {
  TilesOf<TiledBF16> tiles;
  each<0, 8>([&]<int T>() { tiles.zero<T>(); });
  for (int64_t i = 0; i < rounds; ++i) {
    each<0, 4>([&]<int T>() { tiles.add_product<T, 4, 6>(); });
  }
  return 2.0 * static_cast<double>(rounds) * 4 * kTileSide * kTileSide * kTileSide * TiledBF16::kStep;
}
#endif

template <class Kind>
constexpr int64_t kVectorGradientScratch =
    kGradientWords<Kind> * (kGradientRows * kWord + kPanelBytes) + kGradientRows * kGradientColumns * kWord;
template <class Kind>
constexpr int64_t kGradientScratch = kHasTiles<Kind> && kTileGradientScratch > kVectorGradientScratch<Kind>
                                         ? kTileGradientScratch
                                         : kVectorGradientScratch<Kind>;
template <class Kind>
constexpr int64_t kUpScratch = kProductScratch<Kind> + 2 * kKeptSums * kWord;

template <class Kind>
constexpr Kernels table() {
  return {.panel = kPanel,
          .height = kHeight,
          .step = Kind::kStep,
          .widens = Kind::kWidens,
          .has_tiles = kHasTiles<Kind>,
          .block_words = kProductWords<Kind>,
          .wide_words = kWideWords,
          .kept_columns = kKeptPlacedColumns,
          .scratch_bytes = kUpScratch<Kind> > kGradientScratch<Kind> ? kUpScratch<Kind> : kGradientScratch<Kind>,
          .product = product<Kind>,
          .gradient = gradient<Kind>,
          .up = up<Kind>,
          .down = down<Kind>,
          .combine = combine<Kind>,
          .bias_gradient = bias_gradient<Kind>,
          .words = words_of_row<Kind>,
          .has_activation = has_activation,
          .spin = spin<Kind>};
}

// Named in the table of instruction sets. Tiles are of bf16 alone.
#ifdef MOESAIC_TILES
extern const TileKernels tiled;
const TileKernels tiled = {.bf16 = table<TiledBF16>(), .product = one_tile_product};
#else
extern const Kernels f32, bf16;
const Kernels f32 = table<F32>();
const Kernels bf16 = table<BF16>();
#endif

}  // namespace moesaic::MOESAIC_ISA
