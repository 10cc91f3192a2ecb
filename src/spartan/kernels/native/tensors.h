// Lists of tensors, divided into cache-sized chunks.
//
// The chunks depend on the sizes only, so sums come out the same with any number of threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "loops.h"

namespace spartan {

constexpr std::int64_t kChunk = 1 << 14;

struct Chunk {
  std::size_t tensor;
  std::int64_t begin, size;
};

inline std::vector<Chunk> chunks_of(const std::vector<std::int64_t>& sizes) {
  std::vector<Chunk> chunks;
  for (std::size_t t = 0; t < sizes.size(); ++t)
    for (std::int64_t begin = 0; begin < sizes[t]; begin += kChunk)
      chunks.push_back({t, begin, std::min(kChunk, sizes[t] - begin)});
  return chunks;
}

using Pointers = std::vector<std::uintptr_t>;

template <class T>
T* at(const Pointers& pointers, const Chunk& chunk) {
  return reinterpret_cast<T*>(pointers[chunk.tensor]) + chunk.begin;
}

// Adds up the parts of all chunks, in order.
inline Mass total(const std::vector<Mass>& parts, const std::vector<Chunk>& chunks,
                  const std::vector<double>& costs) {
  Mass sum;
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    const double cost = costs[chunks[c].tensor];
    sum.mass += cost * parts[c].mass;
    sum.slope += cost * parts[c].slope;
    sum.curve += cost * parts[c].curve;
  }
  return sum;
}

}  // namespace spartan
