// The experts' kernels: what becomes of the sums of a product before they leave the cache.
#pragma once

#include "activation.hpp"
#include "product_tasks.hpp"

namespace moesaic::MOESAIC_ISA {

constexpr int64_t kKeptSums =
    (kProductRows > kWideRows * kKeptPanels ? kProductRows : kWideRows * kKeptPanels) * kPanel;  // of one product
static_assert(kHeight * kKeptPlacedColumns <= kKeptSums);

// Rows of a task are each at another place in memory; they are brought in before they are needed.
INLINE int64_t rows_ahead(int64_t row_bytes) { return row_bytes <= 256 ? 16 : 8; }

template <bool WRITE>
INLINE void bring_row(const void *row, int64_t bytes) {
  if (!row) return;
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char *>(row) + b, WRITE);
}

template <class Kind>
INLINE ElementOf<Kind> *at(void *rows, int64_t row, int64_t stride, int64_t column) {
  return rows ? static_cast<ElementOf<Kind> *>(rows) + row * stride + column : nullptr;
}
template <class Kind>
INLINE const ElementOf<Kind> *at(const void *rows, int64_t row, int64_t stride, int64_t column) {
  return rows ? static_cast<const ElementOf<Kind> *>(rows) + row * stride + column : nullptr;
}

// Rows of pairs of elements end with a zero where the elements are odd.
template <class Kind>
INLINE void end_row(ElementOf<Kind> *row, int64_t columns) {
  if (Kind::kStep == 2 && columns % 2) row[columns] = 0;
}

// An expert's bias of a task's columns as fp32.
template <class Kind>
static void read_bias(const moesaic_matrix &b, const ProductTask &t, float *out) {
  for (int64_t c = 0; b.data && c < t.columns; ++c) {
    const ElementOf<Kind> *p = element<Kind>(b, t.matrix, t.column + c);
    store_elements(out + c, load_elements(p, 1), 1);
  }
}

// The pre-activations and hidden rows of a task's rows and columns, from the sums of each projection.
template <class Kind>
static void finish_up(const Up &u, const ProductTask &t, const float *const *sums) {
  using Element = ElementOf<Kind>;
  const int64_t width = u.products[0].columns, bytes = t.columns * sizeof(Element), ahead = rows_ahead(bytes);
  const bool gated = u.num_projections > 1;
  float biases[MOESAIC_MAX_PROJECTIONS][kKeptPlacedColumns];
  for (int i = 0; i < u.num_projections; ++i) read_bias<Kind>(u.biases[i], t, biases[i]);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t row = t.first_row + r, line = u.lines[row];
    if (r + ahead < t.rows) {
      bring_row<true>(at<Kind>(u.hidden_rows, row + ahead, u.stride, t.column), bytes);
      for (void *pre : u.pre) bring_row<true>(at<Kind>(pre, u.lines[row + ahead], width, t.column), bytes);
    }
    Element *out = at<Kind>(u.hidden_rows, row, u.stride, t.column);
    Element *pre[] = {at<Kind>(u.pre[0], line, width, t.column), at<Kind>(u.pre[1], line, width, t.column)};
    for (int64_t c = 0; c < t.columns; c += kLanes) {
      const int64_t here = t.columns - c, kept = (c / kPanel * t.rows + r) * kPanel + c % kPanel;
      auto projected = [&](int i) __attribute__((always_inline)) {
        Reg v = load_f32(sums[i] + kept, here);
        if (u.biases[i].data) v = add(v, load_f32(biases[i] + c, here));
        v = rounded_to(out, v);  // as it is saved, so that both passes mean the same function
        if (pre[i]) store_elements(pre[i] + c, v, here);
        return v;
      };
      const Reg gate = projected(0);
      store_elements(out + c, hidden(u.activation, gate, gated ? projected(1) : all(1.f)), here);
    }
    if (t.column + t.columns == width) end_row<Kind>(at<Kind>(u.hidden_rows, row, u.stride, 0), width);
  }
}

template <class Kind>
static void up(const Up &u, Counter &counter, char *scratch) {
  float *first = reinterpret_cast<float *>(scratch + kProductScratch<Kind>);
  float *const sums[MOESAIC_MAX_PROJECTIONS] = {first, first + kKeptSums};
  TilesOf<Kind> tiles;
  each_task(u.products[0], u.num_tasks, counter, [&](const ProductTask &t, const ProductTask *next) {
    for (int p = 0; p < u.num_projections; ++p) {
      const bool last = p + 1 == u.num_projections;
      product_task<Kind>(tiles, u.products[p], t, u.products[last ? 0 : p + 1], last ? next : &t, sums[p], scratch);
    }
    finish_up<Kind>(u, t, sums);
  });
}

// From the gradient of the hidden rows those of the pre-activations, and the columns' part of those of the weights.
template <class Kind>
static void finish_down(const Down &d, const ProductTask &t, const float *sums) {
  using Element = ElementOf<Kind>;
  const int64_t width = d.product.columns, bytes = t.columns * sizeof(Element), ahead = rows_ahead(bytes);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t row = t.first_row + r, line = d.lines[row];
    if (r + ahead < t.rows) {
      for (const void *pre : d.pre) bring_row<false>(at<Kind>(pre, d.lines[row + ahead], width, t.column), bytes);
      for (void *grad : d.pre_grads) bring_row<true>(at<Kind>(grad, row + ahead, d.stride, t.column), bytes);
      bring_row<true>(at<Kind>(d.weighted, row + ahead, d.stride, t.column), bytes);
    }
    const Element *gate = at<Kind>(d.pre[0], line, width, t.column), *up = at<Kind>(d.pre[1], line, width, t.column);
    Element *gate_grad = at<Kind>(d.pre_grads[0], row, d.stride, t.column);
    Element *up_grad = at<Kind>(d.pre_grads[1], row, d.stride, t.column);
    Element *weighted = at<Kind>(d.weighted, row, d.stride, t.column);
    const Reg weight = all(d.weights[d.slots[row]]);
    for (int64_t panel = 0; panel < t.columns; panel += kPanel) {
      Reg dot = zero();
      for (int64_t c = panel; c < least(t.columns, panel + kPanel); c += kLanes) {
        const int64_t here = t.columns - c;
        const Reg factor = up ? load_elements(up + c, here) : all(1.f);
        const Hidden a = hidden_with_slopes(d.activation, load_elements(gate + c, here), factor);
        if (weighted) store_elements(weighted + c, mul(weight, a.value), here);
        if (!sums) continue;
        const Reg u = load_f32(sums + (panel / kPanel * t.rows + r) * kPanel + c % kPanel, here);
        dot = fma(u, rounded_to(gate, a.value), dot);
        const Reg grad = mul(weight, u);
        if (gate_grad) store_elements(gate_grad + c, mul(grad, a.gate_slope), here);
        if (up_grad) store_elements(up_grad + c, mul(grad, a.up_slope), here);
      }
      if (d.dots) d.dots[row * ceil_div(width, kPanel) + (t.column + panel) / kPanel] = total(dot);
    }
    if (t.column + t.columns < width) continue;
    for (void *grad : d.pre_grads) {
      if (grad) end_row<Kind>(at<Kind>(grad, row, d.stride, 0), width);
    }
  }
}

template <class Kind>
static void down(const Down &d, Counter &counter, char *scratch) {
  float *sums = reinterpret_cast<float *>(scratch + kProductScratch<Kind>);
  const Product &p = d.product;
  const bool has_product = p.num_terms > 0;
  TilesOf<Kind> tiles;
  each_task(p, d.num_tasks, counter, [&](const ProductTask &t, const ProductTask *next) {
    if (has_product) product_task<Kind>(tiles, p, t, p, next, sums, scratch);
    finish_down<Kind>(d, t, has_product ? sums : nullptr);
  });
}

template <class Kind>
static void combine(const Combine &m, Counter &counter, char *) {
  using Element = ElementOf<Kind>;
  for (int64_t i = counter.next(); i < m.num_tasks; i = counter.next()) {
    const int64_t first = i * m.tokens_at_once, last = least(m.tokens, first + m.tokens_at_once);
    for (int64_t t = first; t < last; ++t) {
      Element *z = at<Kind>(m.z, t, m.columns, 0);
      for (int64_t c = 0; c < m.columns; c += kPanel) {
        const int64_t width = least<int64_t>(kPanel, m.columns - c);
        Reg sum[kVectors];
        for (int v = 0; v < kVectors; ++v) sum[v] = zero();
        for (int64_t k = t * m.copies; k < (t + 1) * m.copies; ++k) {
          if (m.positions[k] < 0) continue;
          const Element *y = at<Kind>(m.y, m.positions[k], m.columns, c);
          const Element *bias = m.biases.data ? element<Kind>(m.biases, m.ids[k], c) : nullptr;
          const Reg weight = all(m.weights ? m.weights[k] : 1.f);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            if (v * kLanes >= width) continue;
            Reg row = load_elements(y + v * kLanes, width - v * kLanes);
            if (bias) row = add(row, load_elements(bias + v * kLanes, width - v * kLanes));
            sum[v] = fma(weight, row, sum[v]);
          }
        }
        for (int v = 0; v < kVectors && v * kLanes < width; ++v) {
          store_elements(z + c + v * kLanes, sum[v], width - v * kLanes);
        }
      }
    }
  }
}

template <class Kind>
static void bias_gradient(const BiasGradient &b, Counter &counter, char *) {
  constexpr int64_t kRowsAtOnce = 64;  // a long fp32 sum loses digits
  float sums[kBiasColumns], part[kBiasColumns];
  for (int64_t i = counter.next(); i < b.num_tasks; i = counter.next()) {
    const int64_t m = i / b.parts, column = i % b.parts * kBiasColumns, columns = least(kBiasColumns, b.columns - column);
    const ElementOf<Kind> *bias = b.dots ? element<Kind>(b.biases, m, column) : nullptr;
    __builtin_memset(sums, 0, sizeof sums);
    for (int64_t first = b.first_row[m], end = b.first_row[m + 1]; first < end; first += kRowsAtOnce) {
      __builtin_memset(part, 0, sizeof part);
      for (int64_t r = first; r < least(end, first + kRowsAtOnce); ++r) {
        const ElementOf<Kind> *row = element<Kind>(b.rows, b.numbers ? b.numbers[r] : r, column);
        const Reg weight = all(b.weights ? b.weights[b.slots[r]] : 1.f);
        Reg dot = zero();
        for (int64_t c = 0; c < columns; c += kLanes) {
          const Reg v = load_elements(row + c, columns - c);
          store(part + c, fma(weight, v, load(part + c)));
          if (bias) dot = fma(v, load_elements(bias + c, columns - c), dot);
        }
        if (b.dots) b.dots[r * b.parts + i % b.parts] = total(dot);
      }
      for (int64_t c = 0; c < columns; c += kLanes) store(sums + c, add(load(sums + c), load(part + c)));
    }
    ElementOf<Kind> *out = at<Kind>(b.sums, m, b.columns, column);
    for (int64_t c = 0; out && c < columns; c += kLanes) store_elements(out + c, load(sums + c), columns - c);
  }
}

}  // namespace moesaic::MOESAIC_ISA
