// The tasks of a product, each done in the way that suits its rows and the layout of its weights.
#pragma once

#include "amx_product.hpp"
#include "few_rows.hpp"
#include "product.hpp"
#include "quantized.hpp"
#include "transposed.hpp"

namespace moesaic::MOESAIC_ISA {

constexpr int64_t kProductSums = kProductRows > kWideRows * kWidePanels ? kProductRows : kWideRows * kWidePanels;
static_assert(kHeight * kPlacedColumns <= kProductSums * kPanel);
static_assert(kWideWords <= kProductWords<F32> && kWideWords <= kProductWords<BF16>);
template <class Kind>
constexpr int64_t kPanelScratch = (kProductWords<Kind> + kProductSums) * kPanelBytes;
template <class Kind>
constexpr int64_t kVectorScratch = kPanelScratch<Kind> > kTransposedScratch<Kind> ? kPanelScratch<Kind>
                                                                                 : kTransposedScratch<Kind>;
template <class Kind>
constexpr int64_t kProductScratch = kHasTiles<Kind> && kTileScratch > kVectorScratch<Kind> ? kTileScratch
                                                                                           : kVectorScratch<Kind>;

// The task's part of the result where there is nothing to sum.
static void zero_task(const Place &out, const ProductTask &t) {
  const int64_t panels = ceil_div(t.columns, kPanel);
  if (out.kept) {
    __builtin_memset(out.data, 0, panels * out.panel_bytes);
    return;
  }
  for (int64_t r = 0; r < t.rows; ++r) __builtin_memset(Place::at(out, r, 0), 0, t.columns * (out.is_bf16 ? 2 : 4));
}

// One task, into `keep` if that is given. `next` of `next_product` is the task that follows.
template <class Kind>
static void product_task(TilesOf<Kind> &tiles, const Product &p, const ProductTask &t, const Product &next_product,
                         const ProductTask *next, float *keep, char *scratch) {
  const Place out = place(p, t, keep);
  if (t.matrix < 0 || !p.inner) return zero_task(out, t);
  float *sums = keep ? keep : reinterpret_cast<float *>(scratch + kProductWords<Kind> * kPanelBytes);
  if (p.terms[0].scales.format != MOESAIC_PLAIN) {
    return stored_product_task<Kind>(p, t, out, scratch, sums);
  }
  if constexpr (kHasTiles<Kind>) {
    if (takes_tiles(t)) return tile_product_task<Kind>(tiles, p, t, next_product, next, keep, scratch);
  }
  if (takes_places(p, t)) return few_rows<Kind>(p, t, out, sums);
  if (takes_transposed<Kind>(p, t)) return transposed_product<Kind>(p, t, next_product, next, out, scratch);
  const int64_t blocks = num_blocks<Kind>(p, t);
  for (int64_t b = 0; b < blocks; ++b) {
    Ahead ahead;
    if (b + 1 < blocks) {
      ahead = weight_region<Kind>(p, t, b + 1);
    } else if (next) {
      ahead = weight_region<Kind>(next_product, *next, 0);
    }
    multiply_block<Kind>(p, t, b, ahead, out, scratch, sums);
  }
}

// Calls `work` with each task of this thread and the one that follows. That is claimed ahead, so that its panel can be
// brought in. Few rows bring in nothing: there it stays free for other threads, and NULL.
template <class Work>
INLINE void each_task(const Product &p, int64_t num_tasks, Counter &counter, Work work) {
  for (int64_t i = counter.next(); i < num_tasks;) {
    const bool claims = p.num_terms > 0 && !takes_places(p, p.tasks[i]);
    const int64_t next = claims ? counter.next() : num_tasks;
    work(p.tasks[i], next < num_tasks ? &p.tasks[next] : nullptr);
    i = claims ? next : counter.next();
  }
}

template <class Kind>
static void product(const Product &p, Counter &counter, char *scratch) {
  TilesOf<Kind> tiles;
  each_task(p, p.num_tasks, counter, [&](const ProductTask &t, const ProductTask *next) {
    product_task<Kind>(tiles, p, t, p, next, nullptr, scratch);
  });
}

}  // namespace moesaic::MOESAIC_ISA
