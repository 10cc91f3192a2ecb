// All inner loops, compiled for AVX2.

#define SPARTAN_SET avx2
#include "loops.inc"
#include "products.inc"
#include "connections.inc"
#include "mixing.inc"
