#define MOESAIC_ISA avx512
#define MOESAIC_VECTOR "vector_avx512.hpp"
#include "kernels.hpp"
