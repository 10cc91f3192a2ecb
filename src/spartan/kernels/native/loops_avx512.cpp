// All inner loops, compiled for AVX-512.

#define SPARTAN_SET avx512
#include "loops.inc"
#include "products.inc"
#include "connections.inc"
#include "mixing.inc"
