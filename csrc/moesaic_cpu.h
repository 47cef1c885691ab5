/* The CPU kernels' C interface. Nothing of torch is in it, so that one build serves every torch version.

   Strides are in elements. Every function may be called from several threads at a time. */
#ifndef MOESAIC_CPU_H
#define MOESAIC_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Changes with every change of a struct or of the meaning of an argument; the loader compares it. */
#define MOESAIC_CPU_ABI 10

#define MOESAIC_API __attribute__((visibility("default")))

enum moesaic_dtype { MOESAIC_F32 = 0, MOESAIC_BF16 = 1 };

enum moesaic_status {
  MOESAIC_OK = 0,
  MOESAIC_BAD_GROUPS = 1,    /* a size is negative, a block overflows, or a group without a matrix has rows */
  MOESAIC_OUT_OF_MEMORY = 2,
  MOESAIC_BAD_ARGUMENT = 3,  /* a dtype or an instruction set that this build or this machine does not have */
};

/* Rows of `x` in `blocks` equal blocks of `groups` groups each. With `shared`, group g of every block meets matrix g,
   otherwise group g of block b meets matrix b * groups + g. Groups beyond the last matrix have no rows. */
typedef struct {
  const int64_t *sizes; /* [blocks, groups] */
  int64_t blocks, groups;
  int64_t rows;
  int64_t matrices;
  int32_t shared;
} moesaic_groups;

typedef struct {
  const void *data;
  int64_t row_stride, column_stride;
} moesaic_matrix;

/* How weights are stored: as elements of the dtype, or in 8 or 4 bits. */
enum moesaic_format { MOESAIC_PLAIN = 0, MOESAIC_INT8 = 1, MOESAIC_NF4 = 2, MOESAIC_MXFP4 = 3 };

/* The scales of weights in 8 or 4 bits: fp32, of MXFP4 bytes. One for each output, or for each 64 or 32 numbers of it. */
typedef struct {
  const void *data;
  int64_t stride;     /* from expert to expert */
  int64_t row_stride; /* from output to output */
  int32_t format;
} moesaic_scales;

/* With a format, matrix and stride are of bytes, and the stride of the dim along which an output is stored is 0: that of
   rows, or in the backward pass of columns. */
typedef struct {
  moesaic_matrix matrix;
  int64_t stride; /* from expert to expert */
  moesaic_scales scales;
} moesaic_weights;

MOESAIC_API int moesaic_cpu_abi(void);

/* Instruction sets are numbered from 1 on, from worst to best. This is the best one that this build and this machine
   have; 0 is none. After the best that there is come those that nobody gets without asking: "amx", whose bf16 kernels
   use AMX's tiles, and "amx_emulated", the same kernels with tiles in memory, for tests. */
MOESAIC_API int moesaic_cpu_isa(void);

/* Whether this build and this machine have an instruction set. Asked for "amx", the process gets the operating system's
   permission to use tiles, if it gives one. */
MOESAIC_API int moesaic_cpu_has_isa(int isa);

/* The name of an instruction set; NULL for a number that is none's. */
MOESAIC_API const char *moesaic_cpu_isa_name(int isa);

/* y[r] = x[r] @ w[e] for the rows of each group, zero for all others.
   x [rows, inner]; w [matrices, inner, columns], `w_stride` from matrix to matrix; y [rows, columns], contiguous. */
MOESAIC_API int moesaic_cpu_grouped_mm(const moesaic_groups *groups, moesaic_matrix x, moesaic_matrix w, int64_t w_stride, void *y,
                           int64_t inner, int64_t columns, int dtype, int y_dtype, int isa, int threads);

/* The same with weights that have a format. */
MOESAIC_API int moesaic_cpu_quantized_mm(const moesaic_groups *groups, moesaic_matrix x, const moesaic_weights *w, void *y,
                             int64_t inner, int64_t columns, int dtype, int y_dtype, int isa, int threads);

/* gw[e] = sum over the rows of e of x[r]^T grad[r]; zero where there are none. With `accumulate`, added to what gw holds.
   x [rows, inner]; grad [rows, columns]; gw [matrices, inner, columns], contiguous. */
MOESAIC_API int moesaic_cpu_weight_grad(const moesaic_groups *groups, moesaic_matrix x, moesaic_matrix grad, void *gw,
                            int64_t inner, int64_t columns, int dtype, int gw_dtype, int accumulate, int isa,
                            int threads);

/* Where the copies of tokens go. A copy whose id is not that of an expert is not here. */
typedef struct {
  const int64_t *ids;   /* [tokens, copies] */
  const float *weights; /* likewise */
  int64_t tokens, copies;
  const int64_t *lines; /* likewise: where results of projections are kept, each copy that is here on a line of its own;
                           NULL: one copy after the other */
  int64_t num_lines;    /* without `lines` there are as many as copies */
} moesaic_routing;

/* What every expert multiplies rows by: x @ w[e] + b[e]. */
typedef struct {
  moesaic_weights w; /* [experts, inner, columns] */
  moesaic_matrix b;  /* [experts, columns]; data is NULL without a bias */
} moesaic_projection;

#define MOESAIC_MAX_PROJECTIONS 2

enum moesaic_activation {
  MOESAIC_SILU = 0,
  MOESAIC_GELU = 1,
  MOESAIC_GELU_TANH = 2,
  MOESAIC_RELU = 3,
  MOESAIC_RELU2 = 4, /* relu squared */
  MOESAIC_CLAMPED_SWIGLU = 5, /* of gpt-oss: (clamp(up, -7, 7) + 1) g sigmoid(1.702 g), g = min(gate, 7); gated only */
  MOESAIC_NUM_ACTIVATIONS
};

/* MLPs, all operands of one dtype: down(act(first(x)) * second(x)), or with one projection down(act(first(x))). */
typedef struct {
  moesaic_projection projections[MOESAIC_MAX_PROJECTIONS]; /* from dim to hidden */
  moesaic_projection down;                                 /* from hidden to dim */
  int64_t experts, dim, hidden;
  int32_t num_projections, activation, dtype;
} moesaic_experts;

/* z[t] = sum over the copies k of token t of weights[t, k] * mlp(x[t], expert of t, k).
   x [tokens, dim]; z likewise, contiguous; pre[i] [num_lines, hidden], contiguous: the results of projection i, which
   the backward pass needs, zero where no copy is that is here; NULL where they are not wanted. */
MOESAIC_API int moesaic_cpu_experts(const moesaic_routing *routing, const moesaic_experts *experts, moesaic_matrix x, void *z,
                        void *const pre[MOESAIC_MAX_PROJECTIONS], int isa, int threads);

/* Where the gradients of a projection go, contiguous; NULL where one is not wanted. */
typedef struct {
  void *w;
  void *b;
  int32_t transposed; /* the matrices of w are stored transposed */
  int32_t adds;       /* w is fp32, and the gradient is added to what it holds */
} moesaic_projection_grads;

/* Results of the backward pass, contiguous; NULL where one is not wanted. */
typedef struct {
  void *x;
  float *weights;
  moesaic_projection_grads projections[MOESAIC_MAX_PROJECTIONS], down;
} moesaic_experts_grads;

/* The gradients, from that of z and from what the forward pass left in pre. */
MOESAIC_API int moesaic_cpu_experts_backward(const moesaic_routing *routing, const moesaic_experts *experts, moesaic_matrix x,
                                 moesaic_matrix grad, const void *const pre[MOESAIC_MAX_PROJECTIONS],
                                 const moesaic_experts_grads *grads, int isa, int threads);

/* One product of tiles: c += a @ b, with a [16, 32] bf16, b [16, 16] pairs of bf16, each the elements of two rows, and
   c [16, 16], as the instruction TDPBF16PS has it. An instruction set without tiles is a bad argument. */
MOESAIC_API int moesaic_cpu_tile_product(const void *a, const void *b, float *c, int isa);

/* Multiply-adds of registers alone, to measure the machine's peak: the floating-point operations that it did. */
MOESAIC_API double moesaic_cpu_spin(int64_t rounds, int dtype, int isa);

/* Memory for large results: 2 MB aligned, on huge pages, kept for the next one when it comes back.
   At most `limit` bytes are kept idle; 0 keeps none. */
MOESAIC_API void *moesaic_pool_take(int64_t bytes);
MOESAIC_API void moesaic_pool_give(void *data);
MOESAIC_API void moesaic_pool_limit(int64_t limit);
MOESAIC_API void moesaic_pool_state(int64_t *lent, int64_t *idle);

/* A DLManagedTensor over fresh pool memory, whose deleter gives it back; NULL without memory. */
MOESAIC_API void *moesaic_pool_tensor(const int64_t *shape, int ndim, int dtype);

#ifdef __cplusplus
}
#endif
#endif
