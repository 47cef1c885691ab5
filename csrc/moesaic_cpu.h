/* The CPU kernels' C interface. Nothing of torch is in it, so that one build serves every torch version.

   Strides are in elements. Every function may be called from several threads at a time. */
#ifndef MOESAIC_CPU_H
#define MOESAIC_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Changes with every change of a struct or of the meaning of an argument; the loader compares it. */
#define MOESAIC_CPU_ABI 5

#define MOESAIC_API __attribute__((visibility("default")))

enum moesaic_dtype { MOESAIC_F32 = 0, MOESAIC_BF16 = 1 };

enum moesaic_isa { MOESAIC_ISA_NONE = 0, MOESAIC_ISA_AVX2 = 1, MOESAIC_ISA_AVX512 = 2, MOESAIC_ISA_AVX512_BF16 = 3 };

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

MOESAIC_API int moesaic_cpu_abi(void);

/* The best instruction set that this build and this machine have. */
MOESAIC_API int moesaic_cpu_isa(void);

/* y[r] = x[r] @ w[e] for the rows of each group, zero for all others.
   x [rows, inner]; w [matrices, inner, columns], `w_stride` from matrix to matrix; y [rows, columns], contiguous. */
MOESAIC_API int moesaic_cpu_grouped_mm(const moesaic_groups *groups, moesaic_matrix x, moesaic_matrix w, int64_t w_stride, void *y,
                           int64_t inner, int64_t columns, int dtype, int y_dtype, int isa, int threads);

/* gw[e] = sum over the rows of e of x[r]^T grad[r]; zero where there are none. With `accumulate`, added to what gw holds.
   x [rows, inner]; grad [rows, columns]; gw [matrices, inner, columns], contiguous. */
MOESAIC_API int moesaic_cpu_weight_grad(const moesaic_groups *groups, moesaic_matrix x, moesaic_matrix grad, void *gw,
                            int64_t inner, int64_t columns, int dtype, int gw_dtype, int accumulate, int isa,
                            int threads);

/* Where the copies of tokens go. Those whose id is not that of an expert are not here. */
typedef struct {
  const int64_t *ids;   /* [tokens, copies] */
  const float *weights; /* likewise */
  int64_t tokens, copies;
} moesaic_routing;

typedef struct {
  moesaic_matrix matrix;
  int64_t stride; /* from expert to expert */
} moesaic_weights;

enum moesaic_activation {
  MOESAIC_SILU = 0,
  MOESAIC_GELU = 1,
  MOESAIC_GELU_TANH = 2,
  MOESAIC_RELU = 3,
  MOESAIC_RELU2 = 4, /* relu squared */
  MOESAIC_CLAMPED_SWIGLU = 5, /* of gpt-oss: (clamp(h3, -7, 7) + 1) g sigmoid(1.702 g), g = min(h1, 7); gated only */
};

/* Gated MLPs, or without w3.matrix.data MLPs: (act(x @ w1 + b1) * (x @ w3 + b3)) @ w2. All of one dtype. */
typedef struct {
  moesaic_weights w1, w3, w2; /* [experts, dim, hidden], the same, [experts, hidden, dim] */
  moesaic_matrix b1, b3;      /* [experts, hidden]; data may be NULL */
  int64_t experts, dim, hidden;
  int32_t activation, dtype, gated;
} moesaic_experts;

/* z[t] = sum over the copies k of token t of weights[t, k] * mlp(x[t], expert of t, k).
   x [tokens, dim]; z likewise, contiguous; h1, h3 [tokens, copies, hidden], contiguous: the pre-activations,
   zero for copies that are not here, or NULL. */
MOESAIC_API int moesaic_cpu_experts(const moesaic_routing *routing, const moesaic_experts *experts, moesaic_matrix x, void *z,
                        void *h1, void *h3, int isa, int threads);

/* Results of the backward pass, contiguous; NULL where one is not wanted. A flag says that a matrix is stored transposed. With
   `adds` those of w1, w3 and w2 are fp32, and added to what they hold. */
typedef struct {
  void *x;
  float *weights;
  void *w1, *w3, *w2, *b1, *b3;
  int32_t w1_transposed, w3_transposed, w2_transposed, adds;
} moesaic_experts_grads;

/* The gradients, from that of z and from h1 and h3. */
MOESAIC_API int moesaic_cpu_experts_backward(const moesaic_routing *routing, const moesaic_experts *experts, moesaic_matrix x,
                                 moesaic_matrix grad, const void *h1, const void *h3,
                                 const moesaic_experts_grads *grads, int isa, int threads);

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
