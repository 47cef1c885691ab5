#define MOESAIC_ISA avx512_bf16
#include "vector_avx512.hpp"
#include "kernels.hpp"
