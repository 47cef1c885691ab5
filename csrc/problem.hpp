// What the entry points hand to the kernels of an instruction set. Plain data: these files are compiled with flags that
// other machines cannot run, so nothing here may instantiate code that the linker could share.
#pragma once

#include <stdint.h>

#include "moesaic_cpu.h"

namespace moesaic {

// A task of the product: rows that meet one matrix, and some of its columns. Without a matrix, rows to set to zero.
struct ProductTask {
  int64_t first_row, rows;
  int64_t matrix;
  int64_t column, columns;
  int64_t block_words;  // words of the summed dim at a time
};

// A task of the weight gradient: a tile of one matrix.
struct GradientTask {
  int64_t matrix;
  int64_t row, rows;
  int64_t column, columns;
};

// The number of the next task of a call, for all its threads.
class TaskNumbers {
 public:
  __attribute__((always_inline)) TaskNumbers(int64_t tasks, int64_t threads)
      : tasks_(tasks), share_(4 * (threads < 1 ? 1 : threads)), most_(threads < 16 ? 1 : threads / 8) {}
  __attribute__((always_inline)) int64_t take(int64_t count) {
    return __atomic_fetch_add(&next_, count, __ATOMIC_RELAXED);
  }
  __attribute__((always_inline)) bool is_left() const { return left() > 0; }
  // Many threads take several at a time: doing small tasks, each would else have to wait until the line of the number
  // comes from another one. Near the end it is one at a time, so that they end together.
  __attribute__((always_inline)) int64_t batch() const {
    const int64_t fair = left() / share_;
    return fair < 1 ? 1 : fair < most_ ? fair : most_;
  }

 private:
  __attribute__((always_inline)) int64_t left() const { return tasks_ - __atomic_load_n(&next_, __ATOMIC_RELAXED); }
  const int64_t tasks_, share_, most_;
  alignas(64) int64_t next_ = 0;  // in a line of its own
};

// Hands out task numbers to one thread.
class Counter {
 public:
  __attribute__((always_inline)) explicit Counter(TaskNumbers &numbers) : numbers_(numbers) {}
  __attribute__((always_inline)) int64_t next() {
    if (next_ == end_) {
      const int64_t batch = numbers_.batch();
      next_ = numbers_.take(batch);
      end_ = next_ + batch;
    }
    return next_++;
  }

 private:
  TaskNumbers &numbers_;
  int64_t next_ = 0, end_ = 0;
};

// The problems below have defaults for what one of them can do without.

// x @ w, over rows of whole words of x, see `words`.
struct Term {
  moesaic_matrix x, w;
  int64_t w_stride;
  moesaic_scales scales = {};  // of weights with a format; all terms have the same
};

// The sum of up to two terms, of the same sizes.
struct Product {
  Term terms[MOESAIC_MAX_PROJECTIONS] = {};
  int num_terms = 0;
  const int64_t *x_rows = nullptr;  // the row of x that each row of the result takes; NULL: the same
  void *y = nullptr;
  int64_t inner = 0, columns = 0;
  int y_dtype = MOESAIC_F32;
  const ProductTask *tasks = nullptr;
  int64_t num_tasks = 0;
};

struct Gradient {
  moesaic_matrix x, grad;
  void *gw;
  int64_t inner, columns;
  int gw_dtype;
  const int64_t *x_rows, *grad_rows;  // row numbers, matrix after matrix; NULL: they follow each other
  const int64_t *first_row;           // [matrices + 1], into them
  const GradientTask *tasks;
  int64_t num_tasks;
  bool stream;  // write around the caches
  bool adds;    // to what is there
};

// What the experts' kernels share: row r of the sorted order is copy `slots[r]` of a token, and what is kept of it lies on
// line `lines[r]`. The projections are one or two, and what is kept of each is an array.
struct Up {
  Product products[MOESAIC_MAX_PROJECTIONS] = {};  // the task list is the first one's
  moesaic_matrix biases[MOESAIC_MAX_PROJECTIONS] = {};  // of elements; row e is expert e's; data may be NULL
  int num_projections;
  const int64_t *lines;
  void *hidden_rows;  // sorted rows of `stride` elements
  int64_t stride;
  void *pre[MOESAIC_MAX_PROJECTIONS] = {};  // by line; may be NULL
  int activation;
  int64_t num_tasks;
};

// From the gradient of the hidden rows those of what they are made of.
struct Down {
  Product product = {};  // grad @ down^T; without terms only `weighted` is wanted
  const int64_t *slots, *lines;
  const float *weights;                           // by slot
  const void *pre[MOESAIC_MAX_PROJECTIONS] = {};  // by line; NULL where there is no such projection
  void *pre_grads[MOESAIC_MAX_PROJECTIONS] = {};  // sorted rows of `stride` elements; may be NULL
  void *weighted = nullptr;                       // likewise: weight * hidden row
  int64_t stride;
  float *dots = nullptr;  // [rows, panels]: parts of <grad, hidden row @ down>
  int activation;
  int64_t num_tasks = 0;
};

// z[t] = sum over k of weights[t, k] * (y[positions[t, k]] + biases[ids[t, k]]), where there is such a row.
struct Combine {
  const void *y;
  const int64_t *positions;
  const float *weights;  // NULL: 1
  const int64_t *ids;
  moesaic_matrix biases;  // rows contiguous; data may be NULL
  int64_t tokens, copies, columns;
  void *z;
  int64_t tokens_at_once;
  int64_t num_tasks;
};

// sums[m] = the sum over the rows r of matrix m of weights[slots[r]] * rows[numbers[r]], and the dots of those rows with a
// bias of m. A task is some columns of one matrix.
struct BiasGradient {
  moesaic_matrix rows;               // each contiguous
  const int64_t *numbers = nullptr;  // NULL: they follow each other
  const float *weights = nullptr;    // NULL: 1
  const int64_t *slots = nullptr;
  int64_t columns;
  const int64_t *first_row;  // [matrices + 1]
  void *sums;                // may be NULL
  moesaic_matrix biases = {};  // rows contiguous
  float *dots = nullptr;       // [rows, parts]: parts of <rows[numbers[r]], biases[m]>
  int64_t parts;               // tasks of one matrix, of `kBiasColumns` columns each
  int64_t num_tasks;
};

// The kernels of one instruction set and dtype. The threads of a call run the same function, each with a counter over the
// same numbers.
//
// A *word* is what a lane multiplies at once: an fp32, or a pair of bf16 that follow each other in the summed dim.
struct Kernels {
  int panel;     // columns of a packed panel
  int height;    // rows of the register tile
  int step;      // elements of the summed dim in a word
  bool widens;   // words are fp32 although the elements are bf16
  bool has_tiles;  // groups of more rows than `height` are multiplied on AMX's tiles
  int64_t block_words;  // of the summed dim, in a packed panel
  int64_t wide_words;   // likewise, of one of several panels of a task
  int64_t kept_columns;  // of a task of few rows where the sums of two products are kept
  int64_t scratch_bytes;
  void (*product)(const Product &, Counter &, char *scratch);
  void (*gradient)(const Gradient &, Counter &, char *scratch);
  void (*up)(const Up &, Counter &, char *scratch);
  void (*down)(const Down &, Counter &, char *scratch);
  void (*combine)(const Combine &, Counter &, char *scratch);
  void (*bias_gradient)(const BiasGradient &, Counter &, char *scratch);
  // Row `r` of any matrix as words, with zeros after its end.
  void (*words)(const moesaic_matrix &, int64_t r, int64_t inner, void *out);
  // Whether experts of so many projections can have an activation.
  bool (*has_activation)(int activation, int num_projections);
  double (*spin)(int64_t rounds);
};

// Those of an instruction set with tiles, and one product of tiles as such: c [16, 16] += a [16, 32] @ b [32, 16], where
// b is pairs of rows.
struct TileKernels {
  Kernels bf16;
  void (*product)(const void *a, const void *b, float *c);
};

// Limits that the task lists keep, and that scratch memory is laid out for.
constexpr int64_t kProductRows = 768;    // rows of a product task of one panel
constexpr int64_t kWideRows = 192;       // rows of a group so small that its weights are read row after row, in
constexpr int64_t kWidePanels = 8;       // tasks of as many panels, since one panel of a row is a short read
constexpr int64_t kPlacedColumns = 4096;  // of a task whose weights are read in several places at once
constexpr int64_t kFewRows = 4;          // rows of a group whose quantised weights are not worth decoding to a panel
constexpr int64_t kTileTaskRows = 192;   // rows of a product task on AMX's tiles, of as many panels as of kWideRows
constexpr int64_t kKeptPanels = 4;       // likewise where the sums of two products are kept until both are there
constexpr int64_t kGradientRows = 288;   // rows of a gradient task
constexpr int64_t kGradientColumns = 512;
constexpr int64_t kBiasColumns = 512;    // columns of a task of a bias's gradient

}  // namespace moesaic
