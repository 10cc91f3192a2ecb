// Attention weights of the SPARTAN memory: top-k over parents, softmax over children.

#pragma once

#include <cstdint>

namespace spartan {

struct Memory {
  std::int64_t parents, children, chosen;
  std::int64_t values;  // parents * children
  float temperature;    // of the children
};

// Logits of successive positions.
struct Logits {
  const float* of_parents;   // (positions, parents)
  const float* of_children;  // (positions, parents, children)
};

// Room for what is computed about one position, in whole vectors of any instruction set.
struct MixingRoom {
  std::uint32_t* keys;   // of the parents
  std::int64_t* places;  // of those chosen
  float* terms;          // of those chosen, and of their children
};

// Static, as all that is compiled for several instruction sets.
static inline std::int64_t whole_vectors(std::int64_t count) { return (count + 15) / 16 * 16; }

struct MixingLoops {
  // weights[n][c] = a_n b_nc for each position: a is the softmax over the `chosen` largest parents,
  // the first ones of equals, and 0 elsewhere; b_n the softmax over the children of n.
  // A logit of any parent, or of a child that is read, that is not finite makes all weights of its
  // position NaN. Weights may underflow to 0.
  void (*mix)(const Memory&, Logits, std::int64_t positions, float* weights, const MixingRoom&);
};

const MixingLoops& baseline_mixing();
const MixingLoops& avx2_mixing();
const MixingLoops& avx512_mixing();

}  // namespace spartan
