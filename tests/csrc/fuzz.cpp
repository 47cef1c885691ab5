// Calls the C entry points with random problems, for a build with sanitizers.
//
// Every operand ends where an unreadable page begins, or begins where one ends, so that a read of one element too many
// stops the program even where a sanitizer does not look (masked vector loads). Values are small integers, so that
// every sum is exact and a right result has the bits of the naive one.
#include "experts.hpp"
#include "operands.hpp"
#include "stored.hpp"

namespace {

bool one_problem(int isa) {
  const int dtype = static_cast<int>(draw(0, 1)), y_dtype = draw(0, 3) ? dtype : MOESAIC_F32;
  const std::vector<int64_t> dims = {1, 2, 3, 15, 16, 17, 33, 63, 64, 65, 97, 130, 191, 193, 289, 1030};
  const int64_t inner = pick(dims), columns = pick(dims);
  const bool large = inner * columns > 40000;
  const int64_t blocks = draw(1, 3), groups = draw(1, 4);
  const bool shared = blocks > 1 && draw(0, 1);
  const int64_t full = shared ? groups : blocks * groups;
  const int64_t matrices = shared ? full : full - (draw(0, 3) ? 0 : draw(0, groups - 1));
  std::vector<int64_t> sizes(blocks * groups), matrix_of;
  int64_t capacity = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t used = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const bool has_matrix = shared || b * groups + g < matrices;
      sizes[b * groups + g] = has_matrix ? pick(large ? std::vector<int64_t>{0, 1, 3, 7, 14}
                                                      : std::vector<int64_t>{0, 0, 1, 2, 4, 5, 6, 7, 13, 64, 194, 530})
                                         : 0;
      used += sizes[b * groups + g];
    }
    capacity = std::max(capacity, used);
  }
  capacity += draw(0, 2);
  const int64_t rows = blocks * capacity;
  matrix_of.assign(rows, -1);
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t r = b * capacity;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < sizes[b * groups + g]; ++i) matrix_of[r++] = shared ? g : b * groups + g;
    }
  }
  const moesaic_groups layout = {.sizes = sizes.data(),
                                 .blocks = blocks,
                                 .groups = groups,
                                 .rows = rows,
                                 .matrices = matrices,
                                 .shared = shared};
  const Operand x = operand(1, rows, inner, dtype), w = operand(matrices, inner, columns, dtype),
                grad = operand(1, rows, columns, dtype);
  const int threads = static_cast<int>(draw(1, 3));
  bool right = true;

  const Guarded y(rows * columns * (y_dtype == MOESAIC_BF16 ? 2 : 4), draw(0, 1));
  right &= moesaic_cpu_grouped_mm(&layout, x.matrix, w.matrix, w.stride, y.data(), inner, columns, dtype, y_dtype, isa,
                                  threads) == MOESAIC_OK;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      float sum = 0;
      for (int64_t k = 0; matrix_of[r] >= 0 && k < inner; ++k) sum += x.at(0, r, k) * w.at(matrix_of[r], k, c);
      right = right && same(y.data(), r * columns + c, sum, y_dtype, "grouped_mm");
    }
  }

  const int gw_dtype = draw(0, 3) ? dtype : MOESAIC_F32;
  const bool accumulate = draw(0, 1);
  const Guarded gw(matrices * inner * columns * (gw_dtype == MOESAIC_BF16 ? 2 : 4), draw(0, 1));
  for (int64_t i = 0; accumulate && i < matrices * inner * columns; ++i) put(gw.data(), i, i % 5, gw_dtype);
  right &= moesaic_cpu_weight_grad(&layout, x.matrix, grad.matrix, gw.data(), inner, columns, dtype, gw_dtype,
                                   accumulate, isa, threads) == MOESAIC_OK;
  std::vector<float> sums(matrices * inner * columns, 0.f);
  for (size_t i = 0; accumulate && i < sums.size(); ++i) sums[i] = i % 5;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; matrix_of[r] >= 0 && k < inner; ++k) {
      for (int64_t c = 0; c < columns; ++c) {
        sums[(matrix_of[r] * inner + k) * columns + c] += x.at(0, r, k) * grad.at(0, r, c);
      }
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    right = right && same(gw.data(), static_cast<int64_t>(i), sums[i], gw_dtype, "weight_grad");
  }
  if (!right) {
    fprintf(stderr, "isa %d dtype %d y %d inner %lld columns %lld blocks %lld groups %lld shared %d rows %lld\n", isa,
            dtype, y_dtype, static_cast<long long>(inner), static_cast<long long>(columns),
            static_cast<long long>(blocks), static_cast<long long>(groups), shared, static_cast<long long>(rows));
  }
  return right;
}

bool refusals() {
  const int64_t sizes[2] = {3, -1}, many[2] = {3, 3};
  float x[4] = {0}, w[2] = {0}, y[4] = {0};
  moesaic_groups groups = {.sizes = sizes, .blocks = 1, .groups = 2, .rows = 4, .matrices = 2, .shared = 0};
  const moesaic_matrix m = {x, 1, 1};
  const int isa = moesaic_cpu_isa();
  auto call = [&](int dtype, int which) {
    return moesaic_cpu_grouped_mm(&groups, m, {w, 1, 1}, 1, y, 1, 1, dtype, dtype, which, 1);
  };
  bool right = call(MOESAIC_F32, isa) == MOESAIC_BAD_GROUPS;
  groups.sizes = many;
  right &= call(MOESAIC_F32, isa) == MOESAIC_BAD_GROUPS;
  right &= call(7, isa) == MOESAIC_BAD_ARGUMENT && call(MOESAIC_F32, 99) == MOESAIC_BAD_ARGUMENT;
  return right;
}

bool pool() {
  moesaic_pool_limit(8 << 20);
  int64_t lent, idle;
  void *a = moesaic_pool_take(5 << 20), *b = moesaic_pool_take(3 << 20);
  memset(a, 1, 5 << 20);
  moesaic_pool_give(a);
  moesaic_pool_state(&lent, &idle);
  bool right = lent == 4 << 20 && idle == 6 << 20;
  right &= moesaic_pool_take(5 << 20) == a;
  moesaic_pool_give(a);
  moesaic_pool_give(b);
  moesaic_pool_state(&lent, &idle);
  right &= lent == 0 && idle == 4 << 20;  // the longest idle went back
  moesaic_pool_limit(0);
  moesaic_pool_state(&lent, &idle);
  return right && idle == 0;
}

}  // namespace

int main(int argc, char **argv) {
  const int count = argc > 1 ? atoi(argv[1]) : 200;
  generator.seed(argc > 2 ? atoi(argv[2]) : 0);
  if (!refusals() || !pool()) {
    fprintf(stderr, "refusals or pool\n");
    return 1;
  }
  for (int isa = 1; moesaic_cpu_isa_name(isa); ++isa) {
    for (int i = 0; moesaic_cpu_has_isa(isa) && i < count; ++i) {
      if (!one_problem(isa) || !one_quantized_problem(isa) || !one_experts_problem(isa)) return 1;
    }
  }
  puts("ok");
  return 0;
}
