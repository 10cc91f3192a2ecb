// Table of the mask-update loops: one cache-sized chunk each, once per instruction set (loops.inc).

#pragma once

#include <cstdint>

namespace spartan {

// Scores of a tensor: u = x * scale, or |x| * scale. Keys are their bits, ordered as integers.
struct Scores {
  float scale;
  bool absolute;
};

// m = sigmoid(beta (u - reference) + mu).
struct Dual {
  float beta, reference, mu;
};

struct Near {
  std::int64_t above;  // entries with key >= high
  std::int64_t found;  // entries with low <= key < high; -1 if they did not fit
};

// Some bits of a key. Keys are made unsigned first, which keeps their order.
struct Digit {
  int shift, bits;
};

struct Mass {
  double mass = 0, slope = 0, curve = 0;
};

struct Earned {
  double earned = 0, spread = 0;
};

// What decides whether an entry is kept: its key against the threshold's.
struct KeepRule {
  std::int32_t threshold;  // smallest key that is kept
  const bool* mask;        // if given, decides instead
};

// A row of inputs x kernel positions, cut into units of `cols` inputs and `depth` positions.
struct Row {
  std::int64_t inputs, kernel, cols, depth;

  std::int64_t size() const { return inputs * kernel; }
  std::int64_t units() const { return inputs / cols * (kernel / depth); }
};

struct Loops {
  const char* name;

  bool (*finite)(const float* x, std::int64_t n);
  std::int64_t (*count)(const float* x, std::int64_t n, Scores, std::int32_t key);
  Near (*near)(const float* x, std::int64_t n, Scores, std::int32_t low, std::int32_t high,
               std::int32_t* found, std::int64_t capacity);
  // Counts the digits at `shift` of the unsigned keys that begin with `prefix`.
  void (*histogram)(const float* x, std::int64_t n, Scores, Digit, std::uint32_t prefix,
                    std::uint32_t* bins);

  // Sums of sigmoid(x), of s = m (1 - m) and of s (1 - 2 m); with `dropped`, of sigmoid(-x).
  Mass (*mass)(const float* x, std::int64_t n, Scores, Dual, bool dropped);

  // latent <- theta, mask <- kept, weight <- theta * m where kept, else 0.
  void (*project)(const float* theta, float* latent, float* weight, bool* mask, std::int64_t n,
                  Scores, KeepRule, const Dual*);

  // Sums of g theta s and of s.
  Earned (*earn)(const float* grad, const float* theta, std::int64_t n, Scores, Dual);
  // g <- m g + sign(theta) rate s (g theta / cost - price).
  void (*pull_back)(float* grad, const float* theta, std::int64_t n, Scores, Dual, float rate,
                    float cost, float price);
  // g <- g min(1, m per_mask), unchanged from the reference of the dual on.
  void (*damp)(float* grad, const float* theta, std::int64_t n, Scores, Dual, float per_mask);
  // g <- 0 where not kept.
  void (*zero_outside)(float* grad, const bool* mask, std::int64_t n);

  // For units of several weights. Sums |x|, or x y, of one row over units into `sums`.
  void (*pool_row)(const float* x, const float* y, const Row&, double* sums);
  // latent <- theta, weight <- theta factor.
  void (*scale_row)(const float* theta, const float* factor, float* latent, float* weight,
                    std::int64_t n);
  // g <- m g + sign(theta) term.
  void (*pull_back_row)(float* grad, const float* theta, const float* m, const float* term,
                        std::int64_t n);
};

const Loops& baseline_loops();
const Loops& avx2_loops();
const Loops& avx512_loops();

}  // namespace spartan
