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
  std::vector<int64_t> lines;      // line of each row; none where that is the copy
  std::vector<int64_t> tokens;     // token of each row
  std::vector<int64_t> positions;  // row of each copy, or -1
  std::vector<Group> groups;       // experts that have rows
  int64_t rows;
  int64_t num_lines;

  Sorted(const moesaic_routing &r, int64_t experts) : first(experts + 1, 0) {
    const int64_t copies = r.tokens * r.copies;
    num_lines = r.lines || !copies ? r.num_lines : copies;  // an empty array may be NULL
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
    if (r.lines) lines.resize(rows);
    tokens.resize(rows);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    positions.assign(copies, -1);
    for (int64_t s = 0; s < copies; ++s) {
      if (!is_here(s)) continue;
      const int64_t row = next[r.ids[s]]++;
      slots[row] = s;
      if (r.lines) lines[row] = r.lines[s];
      tokens[row] = s / r.copies;
      positions[s] = row;
    }
  }

  const int64_t *line_of_row() const { return (lines.empty() ? slots : lines).data(); }
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
  // Elements of a sorted row of hidden dims: whole lines, which whole words are in.
  int64_t hidden_stride() const { return ceil_div(experts.hidden, 64 / size()) * (64 / size()); }

  std::vector<ProductTask> tasks(int64_t columns, Layout w, Limits limits) const {
    return product_tasks(sorted.groups, {}, columns, k, w, limits, threads);
  }

  // Rows of a step before, as words: where they lie if their elements are multiplied as they are.
  moesaic_matrix rows_as_words(const char *rows, Workspace &copy) const {
    moesaic_matrix m = {rows, hidden_stride(), 1};
    if (k.widens) {
      as_words(m, sorted.rows, experts.hidden, k, copy, threads);
    } else {
      m.row_stride /= k.step;
    }
    return m;
  }

  // y[row] = sum of the terms, then the sum over copies, of the tokens' own weights and biases if they are given.
  int product_and_combine(const Product &terms, Layout w, const float *weights, const moesaic_matrix &biases,
                          void *z) const {
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
    const Combine combine{.y = p.y,
                          .positions = sorted.positions.data(),
                          .weights = weights,
                          .ids = routing.ids,
                          .biases = biases,
                          .tokens = routing.tokens,
                          .copies = routing.copies,
                          .columns = p.columns,
                          .z = z,
                          .tokens_at_once = at_once,
                          .num_tasks = ceil_div(routing.tokens, at_once)};
    return run(k.combine, combine, k.scratch_bytes, threads);
  }
};

Product one_term(const moesaic_matrix &x, const moesaic_weights &w, const int64_t *x_rows, int64_t inner,
                 int64_t columns) {
  return {.terms = {{.x = x, .w = w.matrix, .w_stride = w.stride, .scales = w.scales}},
          .num_terms = 1,
          .x_rows = x_rows,
          .inner = inner,
          .columns = columns};
}

moesaic_weights transposed(const moesaic_weights &w) {
  return {.matrix = {w.matrix.data, w.matrix.column_stride, w.matrix.row_stride},
          .stride = w.stride,
          .scales = w.scales};
}

// That of the weights of all projections.
Layout layout_of_projections(const moesaic_experts &e, bool transpose) {
  auto of = [&](int i) {
    const moesaic_weights &w = e.projections[i].w;
    return layout(transpose ? transposed(w) : w);
  };
  for (int i = 1; i < e.num_projections; ++i) {
    if (of(i) != of(0)) return Layout::kApart;
  }
  return of(0);
}

// The same elements, copied if those of a row are apart.
moesaic_matrix with_contiguous_rows(const moesaic_matrix &m, int64_t rows, int64_t columns, int64_t size, Workspace &copy) {
  if (!m.data || m.column_stride == 1) return m;
  const char *from = static_cast<const char *>(m.data);
  char *to = copy.take(rows * columns * size);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      memcpy(to + (r * columns + c) * size, from + (r * m.row_stride + c * m.column_stride) * size, size);
    }
  }
  return {to, columns, 1};
}

// Lines of no copy that is here.
void zero_absent(const Call &c, void *lines) {
  if (!lines || c.sorted.rows == c.sorted.num_lines) return;
  const int64_t bytes = c.experts.hidden * c.size();
  std::vector<bool> is_used(c.sorted.num_lines);
  for (int64_t r = 0; r < c.sorted.rows; ++r) is_used[c.sorted.line_of_row()[r]] = true;
  for (int64_t l = 0; l < c.sorted.num_lines; ++l) {
    if (!is_used[l]) memset(static_cast<char *>(lines) + l * bytes, 0, bytes);
  }
}

int forward(const Call &c, moesaic_matrix x, void *z, void *const *pre) {
  const moesaic_experts &e = c.experts;
  Workspace hidden, x_words, hidden_words, bias_rows;
  char *rows = hidden.take(c.sorted.rows * c.hidden_stride() * c.size());
  for (int i = 0; i < e.num_projections; ++i) zero_absent(c, pre[i]);
  if (c.sorted.rows && e.hidden) {
    as_words(x, c.routing.tokens, e.dim, c.k, x_words, c.threads);
    const auto tasks = c.tasks(e.hidden, layout_of_projections(e, false), kKeptLimits);
    Up up{.num_projections = e.num_projections,
          .lines = c.sorted.line_of_row(),
          .hidden_rows = rows,
          .stride = c.hidden_stride(),
          .activation = e.activation,
          .num_tasks = static_cast<int64_t>(tasks.size())};
    for (int i = 0; i < e.num_projections; ++i) {
      up.products[i] = one_term(x, e.projections[i].w, c.sorted.tokens.data(), e.dim, e.hidden);
      up.biases[i] = e.projections[i].b;
      up.pre[i] = pre[i];
    }
    up.products[0].tasks = tasks.data();
    const int status = run(c.k.up, up, c.k.scratch_bytes, c.threads);
    if (status != MOESAIC_OK) return status;
  }
  const Product down = one_term(c.rows_as_words(rows, hidden_words), e.down.w, nullptr, e.hidden, e.dim);
  const moesaic_matrix biases = with_contiguous_rows(e.down.b, e.experts, e.dim, c.size(), bias_rows);
  return c.product_and_combine(down, layout(e.down.w), c.routing.weights, biases, z);
}

// The weight gradient x^T @ grad of sorted rows, of which one operand may be gathered; transposed it is grad^T @ x.
int weight_gradient(const Call &c, const moesaic_matrix &x, const int64_t *x_rows, const moesaic_matrix &grad,
                    const int64_t *grad_rows, int64_t inner, int64_t columns, moesaic_projection_grads to) {
  if (!to.w || !inner || !columns) return MOESAIC_OK;
  if (to.transposed) {
    to.transposed = 0;
    return weight_gradient(c, grad, grad_rows, x, x_rows, columns, inner, to);
  }
  const auto tasks = gradient_tasks(c.experts.experts, inner, columns);
  const int64_t row_bytes = columns * (to.adds ? 4 : c.size());
  const Gradient g{.x = x,
                   .grad = grad,
                   .gw = to.w,
                   .inner = inner,
                   .columns = columns,
                   .gw_dtype = to.adds ? MOESAIC_F32 : c.experts.dtype,
                   .x_rows = x_rows,
                   .grad_rows = grad_rows,
                   .first_row = c.sorted.first.data(),
                   .tasks = tasks.data(),
                   .num_tasks = static_cast<int64_t>(tasks.size()),
                   .stream = is_streamed(to.w, row_bytes, c.experts.experts * inner * row_bytes),
                   .adds = to.adds != 0};
  return run(c.k.gradient, g, c.k.scratch_bytes, c.threads);
}

// The gradient of the bias that was added to sorted rows, from theirs.
int bias_gradient(const Call &c, const char *rows, void *sums) {
  if (!sums) return MOESAIC_OK;
  const int64_t parts = ceil_div(c.experts.hidden, kBiasColumns);
  const BiasGradient b{.rows = {rows, c.hidden_stride(), 1},
                       .columns = c.experts.hidden,
                       .first_row = c.sorted.first.data(),
                       .sums = sums,
                       .parts = parts,
                       .num_tasks = c.experts.experts * parts};
  return run(c.k.bias_gradient, b, c.k.scratch_bytes, c.threads);
}

// Of the down projection's bias, and what it adds to the gradients of the routing weights.
int down_bias_gradient(const Call &c, const moesaic_matrix &grad, void *sums, float *dots) {
  if (!sums && !dots) return MOESAIC_OK;
  const moesaic_experts &e = c.experts;
  Workspace grad_rows, bias_rows;
  const int64_t parts = ceil_div(e.dim, kBiasColumns);
  const BiasGradient b{.rows = with_contiguous_rows(grad, c.routing.tokens, e.dim, c.size(), grad_rows),
                       .numbers = c.sorted.tokens.data(),
                       .weights = c.routing.weights,
                       .slots = c.sorted.slots.data(),
                       .columns = e.dim,
                       .first_row = c.sorted.first.data(),
                       .sums = sums,
                       .biases = with_contiguous_rows(e.down.b, e.experts, e.dim, c.size(), bias_rows),
                       .dots = dots,
                       .parts = parts,
                       .num_tasks = e.experts * parts};
  return run(c.k.bias_gradient, b, c.k.scratch_bytes, c.threads);
}

// For every row the sum of its parts, in double.
void add_parts(std::vector<double> &sums, const float *dots, int64_t parts) {
  for (size_t r = 0; r < sums.size(); ++r) {
    for (int64_t i = 0; i < parts; ++i) sums[r] += dots[r * parts + i];
  }
}

int backward(const Call &c, const moesaic_matrix &x, const moesaic_matrix &grad, const void *const *pre,
             const moesaic_experts_grads &g) {
  const moesaic_experts &e = c.experts;
  const int64_t rows = c.sorted.rows, hidden = e.hidden, bytes = rows * c.hidden_stride() * c.size();
  const int64_t panels = ceil_div(hidden, c.k.panel), bias_parts = ceil_div(e.dim, kBiasColumns);
  const int64_t *tokens = c.sorted.tokens.data();
  int status = MOESAIC_OK;
  auto then = [&](int next) { status = status == MOESAIC_OK ? next : status; };
  Workspace pre_grads[MOESAIC_MAX_PROJECTIONS], weighted, dots, grad_words, bias_dots;
  Down down{.slots = c.sorted.slots.data(),
            .lines = c.sorted.line_of_row(),
            .weights = c.routing.weights,
            .stride = c.hidden_stride(),
            .activation = e.activation};
  for (int i = 0; i < e.num_projections; ++i) {
    down.pre[i] = pre[i];
    if (g.x || g.projections[i].w || g.projections[i].b) down.pre_grads[i] = pre_grads[i].take(bytes);
  }
  if (g.down.w) down.weighted = weighted.take(bytes);
  if (g.weights) down.dots = reinterpret_cast<float *>(dots.take(rows * panels * 4));
  if (rows && hidden) {
    const moesaic_weights w = transposed(e.down.w);
    const bool has_product = down.pre_grads[0] || down.pre_grads[1] || down.dots;
    moesaic_matrix words = grad;
    if (has_product) as_words(words, c.routing.tokens, e.dim, c.k, grad_words, c.threads);
    const auto tasks = c.tasks(hidden, layout(w), kKeptLimits);
    down.product = one_term(words, w, tokens, e.dim, hidden);
    if (!has_product) down.product.num_terms = 0;
    down.product.tasks = tasks.data();
    down.num_tasks = static_cast<int64_t>(tasks.size());
    then(run(c.k.down, down, c.k.scratch_bytes, c.threads));
    if (status != MOESAIC_OK) return status;
  }
  float *down_bias_dots = nullptr;
  if (g.weights && e.down.b.data) down_bias_dots = reinterpret_cast<float *>(bias_dots.take(rows * bias_parts * 4));
  then(down_bias_gradient(c, grad, g.down.b, down_bias_dots));
  if (g.weights) {
    std::vector<double> sums(rows);
    add_parts(sums, down.dots, panels);
    if (down_bias_dots) add_parts(sums, down_bias_dots, bias_parts);
    for (size_t s = 0; s < c.sorted.positions.size(); ++s) {
      const int64_t row = c.sorted.positions[s];
      g.weights[s] = row < 0 ? 0.f : static_cast<float>(sums[row]);
    }
  }
  if (g.x) {
    Workspace words[MOESAIC_MAX_PROJECTIONS];
    Product p{.num_terms = e.num_projections, .inner = hidden, .columns = e.dim};
    for (int i = 0; i < e.num_projections; ++i) {
      const moesaic_weights w = transposed(e.projections[i].w);
      p.terms[i] = {.x = c.rows_as_words(pre_grads[i].data(), words[i]),
                    .w = w.matrix,
                    .w_stride = w.stride,
                    .scales = w.scales};
    }
    then(c.product_and_combine(p, layout_of_projections(e, true), nullptr, {}, g.x));
  }
  for (int i = 0; i < e.num_projections; ++i) {
    const moesaic_matrix sorted = {pre_grads[i].data(), c.hidden_stride(), 1};
    then(weight_gradient(c, x, tokens, sorted, nullptr, e.dim, hidden, g.projections[i]));
    then(bias_gradient(c, pre_grads[i].data(), g.projections[i].b));
  }
  then(weight_gradient(c, {weighted.data(), c.hidden_stride(), 1}, nullptr, grad, tokens, hidden, e.dim, g.down));
  return status;
}

// NULL where an argument is not one that there are kernels for.
const Kernels *kernels_of(const moesaic_experts &e, int isa) {
  if (e.num_projections < 1 || e.num_projections > MOESAIC_MAX_PROJECTIONS) return nullptr;
  const Kernels *k = kernels(e.dtype, isa);
  return k && k->has_activation(e.activation, e.num_projections) ? k : nullptr;
}

}  // namespace
}  // namespace moesaic

extern "C" {

int moesaic_cpu_experts(const moesaic_routing *routing, const moesaic_experts *experts, moesaic_matrix x, void *z,
                        void *const pre[MOESAIC_MAX_PROJECTIONS], int isa, int threads) try {
  const moesaic::Kernels *k = moesaic::kernels_of(*experts, isa);
  if (!k) return MOESAIC_BAD_ARGUMENT;
  return moesaic::forward({*routing, *experts, *k, threads}, x, z, pre);
} catch (const std::bad_alloc &) {
  return MOESAIC_OUT_OF_MEMORY;
}

int moesaic_cpu_experts_backward(const moesaic_routing *routing, const moesaic_experts *experts, moesaic_matrix x,
                                 moesaic_matrix grad, const void *const pre[MOESAIC_MAX_PROJECTIONS],
                                 const moesaic_experts_grads *grads, int isa, int threads) try {
  const moesaic::Kernels *k = moesaic::kernels_of(*experts, isa);
  if (!k) return MOESAIC_BAD_ARGUMENT;
  return moesaic::backward({*routing, *experts, *k, threads}, x, grad, pre, *grads);
} catch (const std::bad_alloc &) {
  return MOESAIC_OUT_OF_MEMORY;
}
}
