// The table of one instruction set. Included once in each of the files that are compiled for one.
#pragma once

#include "experts.hpp"
#include "gradient.hpp"
#include "problem.hpp"

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

template <class Kind>
constexpr int64_t kGradientScratch =
    kGradientWords<Kind> * (kGradientRows * kWord + kPanelBytes) + kGradientRows * kGradientColumns * kWord;
template <class Kind>
constexpr int64_t kUpScratch = kProductScratch<Kind> + 2 * kKeptSums * kWord;

template <class Kind>
constexpr Kernels table() {
  return {.panel = kPanel,
          .height = kHeight,
          .step = Kind::kStep,
          .widens = Kind::kWidens,
          .block_words = kProductWords<Kind>,
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

// Named in the table of instruction sets.
extern const Kernels f32, bf16;
const Kernels f32 = table<F32>();
const Kernels bf16 = table<BF16>();

}  // namespace moesaic::MOESAIC_ISA
