#define MOESAIC_ISA avx512_bf16
#define MOESAIC_VECTOR "vector_avx512.hpp"
#include "kernels.hpp"
