#define MOESAIC_ISA avx2
#include "vector_avx2.hpp"
#include "kernels.hpp"
