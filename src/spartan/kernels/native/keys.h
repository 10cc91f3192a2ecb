// Order-preserving map of float scores to int32 keys; the same as in loops.inc.

#pragma once

#include <cstdint>
#include <cstring>

namespace spartan {

inline std::int32_t key_of(float score) {
  std::int32_t bits;
  score += 0.0f;  // turns -0.0 into 0.0
  std::memcpy(&bits, &score, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float score_of(std::int32_t key) {
  float score;
  key ^= (key >> 31) & 0x7fffffff;
  std::memcpy(&score, &key, sizeof score);
  return score;
}

}  // namespace spartan
