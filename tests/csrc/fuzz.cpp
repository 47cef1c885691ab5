// Calls the C entry points with random problems, for a build with sanitizers.
//
// Every operand ends where an unreadable page begins, or begins where one ends, so that a read of one element too many
// stops the program even where a sanitizer does not look (masked vector loads). Values are small integers, so that
// every sum is exact and a right result has the bits of the naive one.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <random>
#include <vector>

#include "../../csrc/moesaic_cpu.h"

namespace {

std::mt19937 generator;

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

int64_t pick(const std::vector<int64_t> &values) { return values[draw(0, static_cast<int64_t>(values.size()) - 1)]; }

// Memory of exactly `bytes` between two unreadable pages.
class Guarded {
 public:
  Guarded(int64_t bytes, bool at_end) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inner = (bytes + page - 1) / page * page;
    size_ = inner + 2 * page;
    void *p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) abort();
    whole_ = static_cast<char *>(p);
    mprotect(whole_, page, PROT_NONE);
    mprotect(whole_ + page + inner, page, PROT_NONE);
    data_ = whole_ + page + (at_end ? inner - bytes : 0);
    memset(data_, 0xff, bytes);  // NaN in both types
  }
  ~Guarded() { munmap(whole_, size_); }
  Guarded(const Guarded &) = delete;
  char *data() const { return data_; }

 private:
  char *whole_, *data_;
  int64_t size_;
};

float get(const char *p, int64_t i, int dtype) {
  if (dtype == MOESAIC_F32) {
    float v;
    memcpy(&v, p + i * 4, 4);
    return v;
  }
  uint16_t half;
  memcpy(&half, p + i * 2, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

void put(char *p, int64_t i, float v, int dtype) {
  if (dtype == MOESAIC_F32) {
    memcpy(p + i * 4, &v, 4);
    return;
  }
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint16_t half = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  memcpy(p + i * 2, &half, 2);
}

struct Operand {
  std::unique_ptr<Guarded> memory;
  moesaic_matrix matrix;
  int64_t stride;  // from matrix to matrix
  int dtype;
  float at(int64_t m, int64_t r, int64_t c) const {
    return get(memory->data(), m * stride + r * matrix.row_stride + c * matrix.column_stride, dtype);
  }
};

// Matrices whose elements lie in rows, in columns, or apart.
Operand operand(int64_t matrices, int64_t rows, int64_t columns, int dtype) {
  const int64_t kind = draw(0, 3), gap = draw(0, 2) ? 0 : draw(1, 5);
  Operand o;
  o.dtype = dtype;
  o.matrix = {nullptr, columns + gap, 1};
  if (kind == 1) o.matrix = {nullptr, 1, rows + gap};
  if (kind == 2) o.matrix = {nullptr, 2 * columns + gap, 2};
  const int64_t last = (rows - 1) * o.matrix.row_stride + (columns - 1) * o.matrix.column_stride;
  o.stride = last + 1 + gap;
  const bool any = matrices && rows && columns;
  const int64_t elements = any ? (matrices - 1) * o.stride + last + 1 : 0;
  o.memory = std::make_unique<Guarded>(elements * (dtype == MOESAIC_BF16 ? 2 : 4), draw(0, 1));
  o.matrix.data = o.memory->data();
  for (int64_t m = 0; any && m < matrices; ++m) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        put(o.memory->data(), m * o.stride + r * o.matrix.row_stride + c * o.matrix.column_stride,
            static_cast<float>(draw(-4, 4)), dtype);
      }
    }
  }
  return o;
}

bool same(const char *y, int64_t i, float expected, int dtype, const char *what) {
  char rounded[4];
  put(rounded, 0, expected, dtype);
  if (get(y, i, dtype) == get(rounded, 0, dtype)) return true;
  fprintf(stderr, "%s: element %lld is %g, not %g\n", what, static_cast<long long>(i), get(y, i, dtype), expected);
  return false;
}

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
                                                      : std::vector<int64_t>{0, 0, 1, 2, 4, 5, 6, 7, 13, 64, 194})
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
  const moesaic_groups layout = {sizes.data(), blocks, groups, rows, matrices, shared};
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

  const Guarded gw(matrices * inner * columns * (dtype == MOESAIC_BF16 ? 2 : 4), draw(0, 1));
  right &= moesaic_cpu_weight_grad(&layout, x.matrix, grad.matrix, gw.data(), inner, columns, dtype, isa, threads) ==
           MOESAIC_OK;
  std::vector<float> sums(matrices * inner * columns, 0.f);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; matrix_of[r] >= 0 && k < inner; ++k) {
      for (int64_t c = 0; c < columns; ++c) {
        sums[(matrix_of[r] * inner + k) * columns + c] += x.at(0, r, k) * grad.at(0, r, c);
      }
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    right = right && same(gw.data(), static_cast<int64_t>(i), sums[i], dtype, "weight_grad");
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
  moesaic_groups groups = {sizes, 1, 2, 4, 2, 0};
  const moesaic_matrix m = {x, 1, 1};
  const int isa = moesaic_cpu_isa();
  auto call = [&](int dtype, int which) {
    return moesaic_cpu_grouped_mm(&groups, m, {w, 1, 1}, 1, y, 1, 1, dtype, dtype, which, 1);
  };
  bool right = call(MOESAIC_F32, isa) == MOESAIC_BAD_GROUPS;
  groups.sizes = many;
  right &= call(MOESAIC_F32, isa) == MOESAIC_BAD_GROUPS;
  right &= call(7, isa) == MOESAIC_BAD_ARGUMENT && call(MOESAIC_F32, isa + 1) == MOESAIC_BAD_ARGUMENT;
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
  for (int isa = MOESAIC_ISA_AVX2; isa <= moesaic_cpu_isa(); ++isa) {
    for (int i = 0; i < count; ++i) {
      if (!one_problem(isa)) return 1;
    }
  }
  puts("ok");
  return 0;
}
