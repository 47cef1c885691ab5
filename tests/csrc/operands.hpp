// Operands between unreadable pages, of random strides and small integers; shared by the fuzz programs.
#pragma once

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
    bytes_ = bytes;
    memset(data_, 0xff, bytes);  // NaN in both types
  }
  ~Guarded() { munmap(whole_, size_); }
  Guarded(const Guarded &) = delete;
  char *data() const { return data_; }
  size_t bytes() const { return static_cast<size_t>(bytes_); }

 private:
  char *whole_, *data_;
  int64_t size_, bytes_;
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
  int64_t place(int64_t m, int64_t r, int64_t c) const {
    return m * stride + r * matrix.row_stride + c * matrix.column_stride;
  }
  float at(int64_t m, int64_t r, int64_t c) const { return get(memory->data(), place(m, r, c), dtype); }
  void set(int64_t m, int64_t r, int64_t c, float v) const { put(memory->data(), place(m, r, c), v, dtype); }
};

// Matrices whose elements lie in rows, in columns, or apart.
Operand operand(int64_t matrices, int64_t rows, int64_t columns, int dtype, int64_t largest = 4) {
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
        o.set(m, r, c, static_cast<float>(draw(-largest, largest)));
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

}  // namespace
