// The C entry points of grouped_mm.
#include <new>

#include "tasks.hpp"

namespace moesaic {
namespace {

int grouped_mm(const moesaic_groups &groups, moesaic_matrix x, const moesaic_weights &w, void *y, int64_t inner,
               int64_t columns, int y_dtype, const Kernels &k, int threads) {
  std::vector<Group> filled, padding;
  if (!read_groups(groups, filled, padding)) return MOESAIC_BAD_GROUPS;
  if (!columns) return MOESAIC_OK;
  if (!inner) {
    padding.assign(1, {0, groups.rows, -1});
    filled.clear();
  }
  Workspace copy;
  if (!filled.empty()) as_words(x, groups.rows, inner, k, copy, threads);
  const auto tasks = product_tasks(filled, padding, columns, k, layout(w), kProductLimits, threads);
  const Product problem{.terms = {{.x = x, .w = w.matrix, .w_stride = w.stride, .scales = w.scales}},
                        .num_terms = 1,
                        .y = y,
                        .inner = inner,
                        .columns = columns,
                        .y_dtype = y_dtype,
                        .tasks = tasks.data(),
                        .num_tasks = static_cast<int64_t>(tasks.size())};
  return run(k.product, problem, k.scratch_bytes, threads);
}

int weight_grad(const moesaic_groups &groups, const moesaic_matrix &x, const moesaic_matrix &grad, void *gw,
                int64_t inner, int64_t columns, int gw_dtype, bool adds, const Kernels &k, int threads) {
  std::vector<Group> filled, padding;
  if (!read_groups(groups, filled, padding)) return MOESAIC_BAD_GROUPS;
  if (!inner || !columns) return MOESAIC_OK;
  std::vector<int64_t> first(groups.matrices + 1, 0);
  for (const Group &g : filled) first[g.matrix + 1] += g.rows;
  for (int64_t m = 0; m < groups.matrices; ++m) first[m + 1] += first[m];
  std::vector<int64_t> rows(first[groups.matrices]), at(first.begin(), first.end() - 1);
  for (const Group &g : filled) {
    for (int64_t r = 0; r < g.rows; ++r) rows[at[g.matrix]++] = g.first_row + r;
  }
  const auto tasks = gradient_tasks(groups.matrices, inner, columns);
  const int64_t row_bytes = columns * (gw_dtype == MOESAIC_BF16 ? 2 : 4);
  const Gradient problem{.x = x,
                         .grad = grad,
                         .gw = gw,
                         .inner = inner,
                         .columns = columns,
                         .gw_dtype = gw_dtype,
                         .x_rows = rows.data(),
                         .grad_rows = rows.data(),
                         .first_row = first.data(),
                         .tasks = tasks.data(),
                         .num_tasks = static_cast<int64_t>(tasks.size()),
                         .stream = is_streamed(gw, row_bytes, groups.matrices * inner * row_bytes),
                         .adds = adds};
  return run(k.gradient, problem, k.scratch_bytes, threads);
}

bool is_dtype(int dtype) { return dtype == MOESAIC_F32 || dtype == MOESAIC_BF16; }

bool is_format(int format) { return format >= MOESAIC_PLAIN && format <= MOESAIC_MXFP4; }

}  // namespace
}  // namespace moesaic

extern "C" {

int moesaic_cpu_abi(void) { return MOESAIC_CPU_ABI; }

int moesaic_cpu_isa(void) { return moesaic::best_isa(); }

int moesaic_cpu_has_isa(int isa) { return moesaic::has_isa(isa); }

const char *moesaic_cpu_isa_name(int isa) { return moesaic::isa_name(isa); }

int moesaic_cpu_grouped_mm(const moesaic_groups *groups, moesaic_matrix x, moesaic_matrix w, int64_t w_stride, void *y,
                           int64_t inner, int64_t columns, int dtype, int y_dtype, int isa, int threads) try {
  const moesaic::Kernels *k = moesaic::kernels(dtype, isa);
  if (!k || !moesaic::is_dtype(y_dtype)) return MOESAIC_BAD_ARGUMENT;
  return moesaic::grouped_mm(*groups, x, {.matrix = w, .stride = w_stride, .scales = {}}, y, inner, columns, y_dtype, *k, threads);
} catch (const std::bad_alloc &) {
  return MOESAIC_OUT_OF_MEMORY;
}

int moesaic_cpu_quantized_mm(const moesaic_groups *groups, moesaic_matrix x, const moesaic_weights *w, void *y,
                             int64_t inner, int64_t columns, int dtype, int y_dtype, int isa, int threads) try {
  const moesaic::Kernels *k = moesaic::kernels(dtype, isa);
  if (!k || !moesaic::is_dtype(y_dtype) || !moesaic::is_format(w->scales.format)) return MOESAIC_BAD_ARGUMENT;
  return moesaic::grouped_mm(*groups, x, *w, y, inner, columns, y_dtype, *k, threads);
} catch (const std::bad_alloc &) {
  return MOESAIC_OUT_OF_MEMORY;
}

int moesaic_cpu_weight_grad(const moesaic_groups *groups, moesaic_matrix x, moesaic_matrix grad, void *gw,
                            int64_t inner, int64_t columns, int dtype, int gw_dtype, int accumulate, int isa,
                            int threads) try {
  const moesaic::Kernels *k = moesaic::kernels(dtype, isa);
  if (!k || !moesaic::is_dtype(gw_dtype)) return MOESAIC_BAD_ARGUMENT;
  return moesaic::weight_grad(*groups, x, grad, gw, inner, columns, gw_dtype, accumulate != 0, *k, threads);
} catch (const std::bad_alloc &) {
  return MOESAIC_OUT_OF_MEMORY;
}

int moesaic_cpu_tile_product(const void *a, const void *b, float *c, int isa) {
  const moesaic::TileKernels *k = moesaic::tile_kernels(isa);
  if (!k) return MOESAIC_BAD_ARGUMENT;
  k->product(a, b, c);
  return MOESAIC_OK;
}

double moesaic_cpu_spin(int64_t rounds, int dtype, int isa) {
  const moesaic::Kernels *k = moesaic::kernels(dtype, isa);
  return k ? k->spin(rounds) : 0;
}
}
