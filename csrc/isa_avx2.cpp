#define MOESAIC_ISA avx2
#define MOESAIC_VECTOR "vector_avx2.hpp"
#include "kernels.hpp"
