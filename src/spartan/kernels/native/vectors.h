// Vectors as wide as the target's registers, in the vector extension of GCC and Clang.
//
// Included once per instruction set, inside that set's namespace: nothing here may be shared
// between translation units that are compiled with different flags.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Uints __attribute__((vector_size(4 * kLanes)));
typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));

static inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

static inline Floats bits_as_floats(Ints v) { return (Floats)v; }
static inline Ints bits_as_ints(Floats v) { return (Ints)v; }

static inline Floats all(float x) { return x - Floats{}; }

static inline Floats abs(Floats v) { return bits_as_floats(bits_as_ints(v) & 0x7fffffff); }

static inline double sum(Floats v) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

static inline std::int64_t sum(Ints v) {
  std::int64_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

static inline bool any(Ints v) {
  std::uint64_t words[sizeof v / 8], joined = 0;
  std::memcpy(words, &v, sizeof v);
  for (std::uint64_t word : words) joined |= word;
  return joined != 0;
}

// Calls f(offset, count) for each vector of n entries; count is kLanes except for the last.
template <class F>
static inline void each_vector(std::int64_t n, F f) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

// Reading ahead by hand: the hardware stops at the end of each page, and a chunk has sixteen.
static inline void prefetch(const float* p) { __builtin_prefetch(p + 512); }

static inline Floats load(const float* p, int count) {
  prefetch(p);
  if (count == kLanes) return load(p);
  Floats v = {};
  std::memcpy(&v, p, 4 * count);
  return v;
}

static inline void store(float* p, Floats v, int count) {
  __builtin_prefetch(p + 512, 1);
  if (count == kLanes)
    store(p, v);
  else
    std::memcpy(p, &v, 4 * count);
}

// All ones in the first `count` lanes.
static inline Ints live(int count) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < count;
}

// exp(x) for x <= 0, within one unit in the last place; 0 up to -87, where floats get denormal.
static inline Floats exp_of_negative(Floats x) {
  const Floats round = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504f + round;
  const Floats n = shifted - round;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // Unsigned: below -87, where the result is not used, the exponent leaves what Ints can hold.
  const Uints exponent = (Uints)bits_as_ints(shifted) << 23;
  const Floats scaled = bits_as_floats((Ints)((Uints)bits_as_ints(p) + exponent));
  return x > -87.0f ? scaled : Floats{};
}

// The smaller and the larger of sigmoid(x) and sigmoid(-x): neither comes from a difference.
struct Sigmoid {
  Floats smaller, larger;
};

static inline Sigmoid sigmoid(Floats x) {
  const Floats e = exp_of_negative(-abs(x));
  const Floats larger = 1.0f / (1.0f + e);
  return {e * larger, larger};
}
