// The C entry points of the experts: tokens sorted by expert, then one kernel after the other over the sorted rows.
#include <string.h>

#include <new>

#include "tasks.hpp"

namespace moesaic {
namespace {

constexpr int64_t kCombinedElements = 32 << 10;  // of y, that a task combines

// The copies that are here, sorted by expert; the order of tokens stays.
struct Sorted {
  std::vector<int64_t> first;      // [experts + 1]: rows of each expert
  std::vector<int64_t> slots;      // copy of each row
  std::vector<int64_t> tokens;     // token of each row
  std::vector<int64_t> positions;  // row of each copy, or -1
  std::vector<Group> groups;       // experts that have rows
  int64_t rows;

  Sorted(const moesaic_routing &r, int64_t experts) : first(experts + 1, 0) {
    const int64_t copies = r.tokens * r.copies;
    auto is_here = [&](int64_t s) { return r.ids[s] >= 0 && r.ids[s] < experts; };
    for (int64_t s = 0; s < copies; ++s) {
      if (is_here(s)) ++first[r.ids[s] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) {
      if (first[e + 1]) groups.push_back({first[e], first[e + 1], e});
      first[e + 1] += first[e];
    }
    rows = first[experts];
    slots.resize(rows);
    tokens.resize(rows);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    positions.assign(copies, -1);
    for (int64_t s = 0; s < copies; ++s) {
      if (!is_here(s)) continue;
      const int64_t row = next[r.ids[s]]++;
      slots[row] = s;
      tokens[row] = s / r.copies;
      positions[s] = row;
    }
  }
};

// One call: what its steps share.
struct Call {
  const moesaic_routing &routing;
  const moesaic_experts &experts;
  const Kernels &k;
  const int threads;
  const Sorted sorted;

  Call(const moesaic_routing &r, const moesaic_experts &e, const Kernels &kernels, int num_threads)
      : routing(r), experts(e), k(kernels), threads(num_threads), sorted(r, e.experts) {}

  int64_t size() const { return experts.dtype == MOESAIC_BF16 ? 2 : 4; }
  bool gated() const { return experts.gated != 0; }
  // Elements of a sorted row of h and its like: whole lines, which whole words are in.
  int64_t h_stride() const { return ceil_div(experts.hidden, 64 / size()) * (64 / size()); }

  std::vector<ProductTask> tasks(int64_t columns, Layout w, Limits limits) const {
    return product_tasks(sorted.groups, {}, columns, k, w, limits, threads);
  }

  // Rows of a step before, as words: where they lie if their elements are multiplied as they are.
  moesaic_matrix rows_as_words(const char *rows, Workspace &copy) const {
    moesaic_matrix m = {rows, h_stride(), 1};
    if (k.widens) {
      as_words(m, sorted.rows, experts.hidden, k, copy, threads);
    } else {
      m.row_stride /= k.step;
    }
    return m;
  }

  // y[row] = sum of the terms, then the sum over copies.
  int product_and_combine(const Product &terms, Layout w, const float *weights, void *z) const {
    Product p = terms;
    Workspace y;
    p.y = y.take(sorted.rows * p.columns * size());
    p.y_dtype = experts.dtype;
    const auto list = tasks(p.columns, w, kProductLimits);
    p.tasks = list.data();
    p.num_tasks = static_cast<int64_t>(list.size());
    const int status = run(k.product, p, k.scratch_bytes, threads);
    if (status != MOESAIC_OK) return status;
    const int64_t row = std::max<int64_t>(1, routing.copies * p.columns);
    const int64_t at_once = std::max<int64_t>(1, kCombinedElements / row);
    const Combine combine{p.y, sorted.positions.data(), weights, routing.tokens, routing.copies, p.columns, z,
                          at_once, ceil_div(routing.tokens, at_once)};
    return run(k.combine, combine, k.scratch_bytes, threads);
  }
};

Product one_term(const moesaic_matrix &x, const moesaic_weights &w, const int64_t *x_rows, int64_t inner,
                 int64_t columns) {
  Product p{};
  p.terms[0] = {x, w.matrix, w.stride};
  p.num_terms = 1;
  p.x_rows = x_rows;
  p.inner = inner;
  p.columns = columns;
  return p;
}

moesaic_weights transposed(const moesaic_weights &w) {
  return {{w.matrix.data, w.matrix.column_stride, w.matrix.row_stride}, w.stride};
}

Layout layout_of_both(const moesaic_weights &a, const moesaic_weights &b) {
  const Layout one = layout(a.matrix);
  return layout(b.matrix) == one ? one : Layout::kApart;
}

// Rows of copies that are not here.
void zero_absent(const Call &c, void *rows) {
  if (!rows || c.sorted.rows == static_cast<int64_t>(c.sorted.positions.size())) return;
  const int64_t bytes = c.experts.hidden * c.size();
  for (size_t s = 0; s < c.sorted.positions.size(); ++s) {
    if (c.sorted.positions[s] < 0) memset(static_cast<char *>(rows) + s * bytes, 0, bytes);
  }
}

int forward(const Call &c, moesaic_matrix x, void *z, void *h1, void *h3) {
  const moesaic_experts &e = c.experts;
  zero_absent(c, h1);
  zero_absent(c, h3);
  Workspace h, x_words, h_words;
  char *rows = h.take(c.sorted.rows * c.h_stride() * c.size());
  if (c.sorted.rows && e.hidden) {
    as_words(x, c.routing.tokens, e.dim, c.k, x_words, c.threads);
    const auto tasks = c.tasks(e.hidden, c.gated() ? layout_of_both(e.w1, e.w3) : layout(e.w1.matrix), kKeptLimits);
    Up up{};
    up.gate = one_term(x, e.w1, c.sorted.tokens.data(), e.dim, e.hidden);
    up.gate.tasks = tasks.data();
    if (c.gated()) up.up = one_term(x, e.w3, c.sorted.tokens.data(), e.dim, e.hidden);
    up.b1 = e.b1;
    up.b3 = e.b3;
    up.slots = c.sorted.slots.data();
    up.h = rows;
    up.h_stride = c.h_stride();
    up.h1 = h1;
    up.h3 = h3;
    up.activation = e.activation;
    up.num_tasks = static_cast<int64_t>(tasks.size());
    const int status = run(c.k.up, up, c.k.scratch_bytes, c.threads);
    if (status != MOESAIC_OK) return status;
  }
  const Product down = one_term(c.rows_as_words(rows, h_words), e.w2, nullptr, e.hidden, e.dim);
  return c.product_and_combine(down, layout(e.w2.matrix), c.routing.weights, z);
}

// The weight gradient x^T @ grad of sorted rows, of which one operand may be gathered; transposed it is grad^T @ x.
int weight_gradient(const Call &c, const moesaic_matrix &x, const int64_t *x_rows, const moesaic_matrix &grad,
                    const int64_t *grad_rows, int64_t inner, int64_t columns, void *gw, bool transposed, bool adds) {
  if (transposed) return weight_gradient(c, grad, grad_rows, x, x_rows, columns, inner, gw, false, adds);
  if (!gw || !inner || !columns) return MOESAIC_OK;
  const auto tasks = gradient_tasks(c.experts.experts, inner, columns);
  const int64_t row_bytes = columns * (adds ? 4 : c.size());
  const Gradient g{x, grad, gw, inner, columns, adds ? MOESAIC_F32 : c.experts.dtype, x_rows, grad_rows, c.sorted.first.data(),
                   tasks.data(), static_cast<int64_t>(tasks.size()),
                   is_streamed(gw, row_bytes, c.experts.experts * inner * row_bytes), adds};
  return run(c.k.gradient, g, c.k.scratch_bytes, c.threads);
}

int bias_gradient(const Call &c, const char *rows, void *gb) {
  if (!gb || !c.experts.hidden) return MOESAIC_OK;
  const RowSums sums{rows, c.h_stride(), c.experts.hidden, c.sorted.first.data(), gb, c.experts.experts};
  return run(c.k.row_sums, sums, c.k.scratch_bytes, c.threads);
}

// The gradients of the routing weights: for each copy that is here, the sum of its row's parts.
void sum_dots(const Call &c, const float *dots, float *grads) {
  const int64_t panels = ceil_div(c.experts.hidden, c.k.panel);
  for (size_t s = 0; s < c.sorted.positions.size(); ++s) {
    double sum = 0;
    for (int64_t i = 0; c.sorted.positions[s] >= 0 && i < panels; ++i) sum += dots[c.sorted.positions[s] * panels + i];
    grads[s] = static_cast<float>(sum);
  }
}

int backward(const Call &c, const moesaic_matrix &x, const moesaic_matrix &grad, const void *h1, const void *h3,
             const moesaic_experts_grads &g) {
  const moesaic_experts &e = c.experts;
  const int64_t rows = c.sorted.rows, hidden = e.hidden, bytes = rows * c.h_stride() * c.size();
  const int64_t *tokens = c.sorted.tokens.data();
  const bool any = rows && hidden;
  Workspace dh1, dh3, h, dots, grad_words, words1, words3;
  Down down{};
  if (g.x || g.w1 || g.b1) down.dh1 = dh1.take(bytes);
  if (c.gated() && (g.x || g.w3 || g.b3)) down.dh3 = dh3.take(bytes);
  if (g.w2) down.h = h.take(bytes);
  if (g.weights) down.dots = reinterpret_cast<float *>(dots.take(rows * ceil_div(hidden, c.k.panel) * 4));
  if (any) {
    const moesaic_weights w = transposed(e.w2);
    moesaic_matrix sums = grad;
    if (down.dh1 || down.dh3 || down.dots) as_words(sums, c.routing.tokens, e.dim, c.k, grad_words, c.threads);
    const auto tasks = c.tasks(hidden, layout(w.matrix), kKeptLimits);
    down.product = one_term(sums, w, tokens, e.dim, hidden);
    if (!(down.dh1 || down.dh3 || down.dots)) down.product.num_terms = 0;
    down.product.tasks = tasks.data();
    down.slots = c.sorted.slots.data();
    down.weights = c.routing.weights;
    down.h1 = h1;
    down.h3 = c.gated() ? h3 : nullptr;
    down.stride = c.h_stride();
    down.activation = e.activation;
    down.num_tasks = static_cast<int64_t>(tasks.size());
    const int status = run(c.k.down, down, c.k.scratch_bytes, c.threads);
    if (status != MOESAIC_OK) return status;
  }
  if (g.weights) sum_dots(c, down.dots, g.weights);
  int status = MOESAIC_OK;
  auto then = [&](int next) { status = status == MOESAIC_OK ? next : status; };
  if (g.x) {
    const moesaic_weights w1 = transposed(e.w1), w3 = transposed(e.w3);
    Product p = one_term(c.rows_as_words(dh1.data(), words1), w1, nullptr, hidden, e.dim);
    if (c.gated()) {
      p.terms[1] = {c.rows_as_words(dh3.data(), words3), w3.matrix, w3.stride};
      p.num_terms = 2;
    }
    then(c.product_and_combine(p, c.gated() ? layout_of_both(w1, w3) : layout(w1.matrix), nullptr, g.x));
  }
  auto sorted_rows = [&](const Workspace &w) { return moesaic_matrix{w.data(), c.h_stride(), 1}; };
  then(weight_gradient(c, x, tokens, sorted_rows(dh1), nullptr, e.dim, hidden, g.w1, g.w1_transposed, g.adds));
  then(weight_gradient(c, x, tokens, sorted_rows(dh3), nullptr, e.dim, hidden, g.w3, g.w3_transposed, g.adds));
  then(weight_gradient(c, sorted_rows(h), nullptr, grad, tokens, hidden, e.dim, g.w2, g.w2_transposed, g.adds));
  then(bias_gradient(c, dh1.data(), g.b1));
  then(bias_gradient(c, dh3.data(), g.b3));
  return status;
}

// NULL where an argument is not one that there are kernels for.
const Kernels *kernels_of(const moesaic_experts &e, int isa) {
  if (e.activation < MOESAIC_SILU || e.activation > MOESAIC_CLAMPED_SWIGLU) return nullptr;
  if (e.activation == MOESAIC_CLAMPED_SWIGLU && !e.gated) return nullptr;
  return kernels(e.dtype, isa);
}

}  // namespace
}  // namespace moesaic

extern "C" {

int moesaic_cpu_experts(const moesaic_routing *routing, const moesaic_experts *experts, moesaic_matrix x, void *z,
                        void *h1, void *h3, int isa, int threads) try {
  const moesaic::Kernels *k = moesaic::kernels_of(*experts, isa);
  if (!k) return MOESAIC_BAD_ARGUMENT;
  return moesaic::forward({*routing, *experts, *k, threads}, x, z, h1, h3);
} catch (const std::bad_alloc &) {
  return MOESAIC_OUT_OF_MEMORY;
}

int moesaic_cpu_experts_backward(const moesaic_routing *routing, const moesaic_experts *experts, moesaic_matrix x,
                                 moesaic_matrix grad, const void *h1, const void *h3,
                                 const moesaic_experts_grads *grads, int isa, int threads) try {
  const moesaic::Kernels *k = moesaic::kernels_of(*experts, isa);
  if (!k) return MOESAIC_BAD_ARGUMENT;
  return moesaic::backward({*routing, *experts, *k, threads}, x, grad, h1, h3, *grads);
} catch (const std::bad_alloc &) {
  return MOESAIC_OUT_OF_MEMORY;
}
}
