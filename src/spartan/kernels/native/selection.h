// Exact top-k threshold of many tensors with costs, without a sort.
//
// Found is the entry, in order of decreasing score and then of position, at which a budget is used
// up. The same pass over the memory checks and sums the entries.

#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"
#include "tensors.h"

namespace spartan {

struct ScanRequest {
  Pointers tensors;
  std::vector<std::int64_t> sizes;
  std::vector<float> scales;
  std::vector<double> costs;
  bool absolute;
  double budget;
  float low, high;   // the threshold is expected between them, if low < high
  const Dual* dual;  // if given, its soft mass is summed on the way
  bool dropped;
  bool counted;  // whether `above` is wanted
  int threads;
};

struct Cutoff {
  bool finite;      // whether all entries are; nothing else means anything if not
  float threshold;  // entries above it are kept
  std::vector<std::int64_t> tie_ends;  // of those equal to it, the ones at positions before this
  std::vector<std::int64_t> above;     // how many entries of each tensor lie above it
  Mass mass;
};

// The budget must lie above 0 and below the total cost. A wrong bracket costs time only. The
// entries in it are collected in less than 1/20 of the memory of the tensors.
Cutoff find_cutoff(const Loops& loops, const ScanRequest& request);

}  // namespace spartan
