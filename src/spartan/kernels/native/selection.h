// Exact selection without a sort: the entry, in order of decreasing score and then of position, at
// which a budget is used up.

#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"
#include "tensors.h"

namespace spartan {

struct Request {
  Pointers tensors;
  std::vector<std::int64_t> sizes;
  std::vector<float> scales;
  std::vector<double> costs;
  bool absolute;
  double budget;
  int threads;
};

struct Cut {
  float threshold;                  // entries above it are kept
  std::vector<std::int64_t> stops;  // of those equal to it, the ones at positions before this
  bool warm;                        // whether the bracket held the threshold
};

// `low` and `high` bracket the threshold if low < high; a wrong bracket costs time only. The
// budget must lie above 0 and below the total cost. The entries near the threshold are collected in
// at most 1/32 of the memory of the tensors.
Cut find_cut(const Loops& loops, const Request& request, float low, float high);

}  // namespace spartan
