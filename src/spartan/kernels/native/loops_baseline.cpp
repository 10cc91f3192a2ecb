// All inner loops, compiled for any processor of the architecture.

#define SPARTAN_SET baseline
#include "loops.inc"
#include "products.inc"
#include "connections.inc"
#include "mixing.inc"
