// A vector of FUSEDRNN_VECTOR_BYTES bytes on the compiler's vector extensions: one source for every instruction
// set. Included inside the unnamed namespace of each isa_*.cpp; no intrinsics, no library calls.
// Accuracy of the activations, measured against a wider type over all floats (tests/test_activations.py):
//   sigmoid 2.5 ulp, tanh 2.5 ulp (float); sigmoid 3 ulp, tanh 3 ulp (double).
// A sigmoid whose e^-x overflows is 0, as torch's is. Of +-inf comes the limit itself, of NaN comes NaN: a small number
// in the place of a 0 would hide the infinity that it is multiplied with.

template <class S>
struct Raw;
template <>
struct Raw<float> {
  typedef float Type __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
};
template <>
struct Raw<double> {
  typedef double Type __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
};

template <>
struct Raw<int32_t> {  // sums of products of bytes
  typedef int32_t Type __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef int32_t Unaligned __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
};

template <class S>
struct Vec {
  using Scalar = S;
  using Type = typename Raw<S>::Type;
  static constexpr int kLanes = FUSEDRNN_VECTOR_BYTES / sizeof(S);
  Type v;

  Vec() = default;
  FUSEDRNN_INLINE explicit Vec(S s) : v(s - Type{}) {}
  FUSEDRNN_INLINE explicit Vec(int s)
    requires(!std::is_same_v<S, int>)
      : Vec(static_cast<S>(s)) {}
  FUSEDRNN_INLINE explicit Vec(double s)
    requires(std::is_same_v<S, float>)
      : Vec(static_cast<S>(s)) {}
  FUSEDRNN_INLINE Vec(Type raw) : v(raw) {}
  FUSEDRNN_INLINE friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  FUSEDRNN_INLINE friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  FUSEDRNN_INLINE friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  FUSEDRNN_INLINE friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
};

// ---- memory -----------------------------------------------------------------------------------------------------

template <class S>
FUSEDRNN_INLINE Vec<S> load(const S* p) {
  return typename Raw<S>::Type(*reinterpret_cast<const typename Raw<S>::Unaligned*>(p));
}

template <class S>
FUSEDRNN_INLINE void store(S* p, Vec<S> a) {
  *reinterpret_cast<typename Raw<S>::Unaligned*>(p) = a.v;
}

// Asks for the cache lines of p[0, n); the last one apart, if p does not begin one. The compiler deletes a call of a
// function that does nothing but prefetch, before it would inline it: lambdas around these need the attribute
// always_inline.
template <class T>
FUSEDRNN_INLINE void prefetch_to_read(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_prefetch(p + n - 1);
}
template <class T>
FUSEDRNN_INLINE void prefetch_to_write(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i, 1);
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_prefetch(p + n - 1, 1);
}

typedef uint16_t HalfWords __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2)));
typedef uint16_t HalfWordsUnaligned __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));

FUSEDRNN_INLINE Vec<float> load(const BFloat16* p) {
#if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 64 && !defined(FUSEDRNN_AVX2_AS_AVX512)
  Words words;  // g++ widens the two halves of a vector apart
  asm("vpmovzxwd %1, %0" : "=v"(words) : "m"(*reinterpret_cast<const HalfWordsUnaligned*>(p)));
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32
  Words words;
  asm("vpmovzxwd %1, %0" : "=x"(words) : "m"(*reinterpret_cast<const HalfWordsUnaligned*>(p)));
#else
  const Words words = __builtin_convertvector(HalfWords(*reinterpret_cast<const HalfWordsUnaligned*>(p)), Words);
#endif
  return (Raw<float>::Type)(words << 16);
}

FUSEDRNN_INLINE Words rounded_to_bfloat16(Vec<float> a) {  // to nearest, ties to even; NaN stays NaN
  const Words bits = (Words)a.v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  return (Words)(a.v != a.v ? quiet : rounded);
}

FUSEDRNN_INLINE void store(BFloat16* p, Vec<float> a) {
  *reinterpret_cast<HalfWordsUnaligned*>(p) = __builtin_convertvector(rounded_to_bfloat16(a), HalfWords);
}

typedef int8_t Bytes __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 4), aligned(1), may_alias));

// Rounded to nearest, ties to even. |a| <= 127; of NaN some number comes. a is a product rounded to float32 before,
// here and on every instruction set: in one multiply-add with the rounding below some numbers near a tie would go
// elsewhere.
FUSEDRNN_INLINE void store(int8_t* p, Vec<float> a) {
#if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 64 && defined(FUSEDRNN_AVX2_AS_AVX512)
  asm("" : "+m"(a.v));
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 64
  asm("" : "+v"(a.v));
#elif defined(__x86_64__)
  asm("" : "+x"(a.v));
#elif defined(__aarch64__)
  asm("" : "+w"(a.v));
#else
#error "one line that keeps a product apart from the sum after it"
#endif
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a sum with it has the integer in its low bits
  const auto bits = (Raw<float>::Int)(a.v + kRound) - 0x4b400000;
  *reinterpret_cast<Bytes*>(p) = __builtin_convertvector(bits, Bytes);
}

template <class S>
constexpr int64_t kWordsOf = sizeof(S) / sizeof(uint32_t);
// The first n lanes of a vector, n <= kLanes, come below. A masked instruction touches no memory past them; a copy lane
// by lane, which is what there is without one, is read as a vector before it has reached the cache, and waits.
// (AddressSanitizer sees the copy alone.)
typedef uint32_t WordsAnywhere __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES), aligned(1), may_alias));
#if !defined(__x86_64__) || defined(__SANITIZE_ADDRESS__)
#elif FUSEDRNN_VECTOR_BYTES == 64 && !defined(FUSEDRNN_AVX2_AS_AVX512)
#define FUSEDRNN_MASKED_LOADS
#define FUSEDRNN_MASKED_STORES
FUSEDRNN_INLINE uint16_t first_words(int64_t n) { return static_cast<uint16_t>((1u << (n > 0 ? n : 0)) - 1); }
FUSEDRNN_INLINE Words load_words_masked(const void* p, int64_t n) {
  Words words;
  asm("vmovdqu32 %1, %0%{%2%}%{z%}" : "=v"(words) : "m"(*static_cast<const WordsAnywhere*>(p)), "Yk"(first_words(n)));
  return words;
}
FUSEDRNN_INLINE void store_words_masked(void* p, Words words, int64_t n) {
  asm("vmovdqu32 %1, %0%{%2%}" : "+m"(*static_cast<WordsAnywhere*>(p)) : "v"(words), "Yk"(first_words(n)));
}
#elif FUSEDRNN_VECTOR_BYTES == 32
#define FUSEDRNN_MASKED_LOADS
FUSEDRNN_INLINE Words load_words_masked(const void* p, int64_t n) {
  typedef Raw<float>::Int Lanes;
  Words words;
  const Lanes mask = Lanes{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<int32_t>(n);
  asm("vpmaskmovd %1, %2, %0" : "=x"(words) : "m"(*static_cast<const WordsAnywhere*>(p)), "x"(mask));
  return words;
}
#endif

// The other lanes load as zero. Full vectors take the fast path.
template <class S, class T>
FUSEDRNN_INLINE Vec<S> load(const T* p, int64_t n) {
  if (__builtin_expect(n >= Vec<S>::kLanes, 1)) return load(p);
#if defined(FUSEDRNN_MASKED_LOADS)
  if constexpr (std::is_same_v<S, T>) return (typename Raw<S>::Type)load_words_masked(p, n * kWordsOf<S>);
#endif
  T lanes[Vec<S>::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class S, class T>
FUSEDRNN_INLINE void store(T* p, Vec<S> a, int64_t n) {
  if (__builtin_expect(n >= Vec<S>::kLanes, 1)) return store(p, a);
#if defined(FUSEDRNN_MASKED_STORES)
  if constexpr (std::is_same_v<S, T>) return store_words_masked(p, (Words)a.v, n * kWordsOf<S>);
#endif
  T lanes[Vec<S>::kLanes];
  store(lanes, a);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

FUSEDRNN_INLINE float to_compute(BFloat16 s) {
  const uint32_t bits = static_cast<uint32_t>(s.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
FUSEDRNN_INLINE float to_compute(float s) { return s; }
FUSEDRNN_INLINE double to_compute(double s) { return s; }

// ---- lanes ------------------------------------------------------------------------------------------------------

// Exchange of lanes a distance d apart between a and b, L lanes each; the second operand's lanes count from L on.
template <int d, int L>
struct LowLanes {  // a[j] where bit d of j is clear, else b[j - d]
  static constexpr int of(int j) { return j & d ? L + j - d : j; }
};
template <int d, int L>
struct HighLanes {  // a[j + d] where bit d of j is clear, else b[j]
  static constexpr int of(int j) { return j & d ? L + j : j + d; }
};

template <class Index, class S, int... J>
FUSEDRNN_INLINE Vec<S> shuffle(Vec<S> a, Vec<S> b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
  return Vec<S>(__builtin_shufflevector(a.v, b.v, Index::of(J)...));
#else
  return Vec<S>(__builtin_shuffle(a.v, b.v, typename Raw<S>::Int{Index::of(J)...}));
#endif
}
template <template <int, int> class Index, int d, class S>
FUSEDRNN_INLINE Vec<S> exchange(Vec<S> a, Vec<S> b) {
  constexpr int L = Vec<S>::kLanes;
  return shuffle<Index<d, L>>(a, b, std::make_integer_sequence<int, L>());
}

// Rows and columns of a square of L x L elements change places.
template <int d = 1, class S>
FUSEDRNN_INLINE void transpose(Vec<S> (&rows)[Vec<S>::kLanes]) {
  if constexpr (d < Vec<S>::kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < Vec<S>::kLanes; ++i) {
      if (i & d) continue;
      const Vec<S> a = rows[i], b = rows[i + d];
      rows[i] = exchange<LowLanes, d>(a, b);
      rows[i + d] = exchange<HighLanes, d>(a, b);
    }
    transpose<2 * d>(rows);
  }
}

// Lane i of the result: the sum of the lanes of rows[i]. Destroys rows.
template <int d = 1, class S>
FUSEDRNN_INLINE Vec<S> sums_of_lanes(Vec<S> (&rows)[Vec<S>::kLanes]) {
  constexpr int L = Vec<S>::kLanes;
  if constexpr (d < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L / 2 / d; ++i) {
      const Vec<S> a = rows[2 * i], b = rows[2 * i + 1];
      rows[i] = exchange<LowLanes, d>(a, b) + exchange<HighLanes, d>(a, b);
    }
    return sums_of_lanes<2 * d>(rows);
  }
  return rows[0];
}

template <class S>
FUSEDRNN_INLINE S sum_of_lanes(Vec<S> a) {
  S sum = 0;
  for (int lane = 0; lane < Vec<S>::kLanes; ++lane) sum += a.v[lane];
  return sum;
}

// Zero in all lanes but the first n.
template <class S>
FUSEDRNN_INLINE Vec<S> first_lanes(Vec<S> a, int64_t n) {
  if (__builtin_expect(n >= Vec<S>::kLanes, 1)) return a;
  for (int lane = 0; lane < Vec<S>::kLanes; ++lane) {
    if (lane >= n) a.v[lane] = 0;
  }
  return a;
}

// ---- limits (rules.h) ---------------------------------------------------------------------------------------------

template <class S>
FUSEDRNN_INLINE Vec<S> lesser(Vec<S> v, Vec<S> limit) {  // comparisons are false for NaN, which passes
  return Vec<S>(v.v > limit.v ? limit.v : v.v);
}
template <class S>
FUSEDRNN_INLINE Vec<S> greater(Vec<S> v, Vec<S> limit) {
  return Vec<S>(v.v < limit.v ? limit.v : v.v);
}

// ---- activations ------------------------------------------------------------------------------------------------

template <class S>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float kLog2e = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr int32_t kRoundBits = 0x4b400000, kBias = 127;
  static constexpr int kMantissa = 23;
  // Beyond these the result does not change any more: -x of a sigmoid, |x| of a tanh.
  static constexpr float kSigmoidLow = -80.0f, kSigmoidHigh = 89.0f, kTanhLimit = 9.1f;
  // (e^r - 1 - r) / r^2 on |r| <= ln(2)/2 (Cephes expf)
  static constexpr float kPoly[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                    4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};
template <>
struct Exp<double> {
  static constexpr double kLog2e = 1.4426950408889634074, kLn2High = 6.93145751953125e-1,
                          kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int64_t kRoundBits = 0x4338000000000000, kBias = 1023;
  static constexpr int kMantissa = 52;
  static constexpr double kSigmoidLow = -700.0, kSigmoidHigh = 710.0, kTanhLimit = 19.1;
  // Taylor: 1/13! ... 1/2!; the remainder on |r| <= ln(2)/2 is below 2^-57
  static constexpr double kPoly[] = {1.6059043836821613e-10, 2.0876756987868099e-09, 2.5052108385441720e-08,
                                     2.7557319223985893e-07, 2.7557319223985888e-06, 2.4801587301587302e-05,
                                     1.9841269841269841e-04, 1.3888888888888889e-03, 8.3333333333333332e-03,
                                     4.1666666666666664e-02, 1.6666666666666666e-01, 5.0000000000000000e-01};
};

// x = n ln 2 + r: returns e^r - 1 and 2^(n - less). |x| must be small enough that this is a normal number.
template <int less, class S>
FUSEDRNN_INLINE Vec<S> expm1_reduced(Vec<S> x, Vec<S>& power) {
  using E = Exp<S>;
  using Int = typename Raw<S>::Int;
  const Vec<S> shifted = x * Vec<S>(E::kLog2e) + Vec<S>(E::kRound);
  const Vec<S> n = shifted - Vec<S>(E::kRound);
  const Vec<S> r = (x - n * Vec<S>(E::kLn2High)) - n * Vec<S>(E::kLn2Low);
  Vec<S> p(E::kPoly[0]);
  for (unsigned i = 1; i < sizeof(E::kPoly) / sizeof(S); ++i) p = p * r + Vec<S>(E::kPoly[i]);
  const Int exponent = (Int)shifted.v - E::kRoundBits + (E::kBias - less);
  power = (typename Raw<S>::Type)(exponent << E::kMantissa);
  return p * (r * r) + r;
}

template <class S>
FUSEDRNN_INLINE Vec<S> sigmoid(Vec<S> x) {  // e^-x = 2 e^r 2^(n-1), for 2^n may overflow where e^-x does not
  const Vec<S> hi(Exp<S>::kSigmoidHigh), lo(Exp<S>::kSigmoidLow);
  const Vec<S> u = greater(lesser(Vec<S>(0) - x, hi), lo);
  Vec<S> half_two_n;
  const Vec<S> m = expm1_reduced<1>(u, half_two_n);
  return Vec<S>(1) / (Vec<S>(1) + (m * Vec<S>(2) + Vec<S>(2)) * half_two_n);
}

template <class S>
FUSEDRNN_INLINE Vec<S> tanh(Vec<S> x) {  // t = e^(2|x|) - 1, tanh|x| = t / (t + 2)
  using Int = typename Raw<S>::Int;
  const Int sign = (Int)Vec<S>(S(-0.0)).v;
  const Vec<S> a = lesser(Vec<S>((typename Raw<S>::Type)((Int)x.v & ~sign)), Vec<S>(Exp<S>::kTanhLimit));
  Vec<S> two_n;
  const Vec<S> m = expm1_reduced<0>(a + a, two_n);
  const Vec<S> t = m * two_n + (two_n - Vec<S>(1));
  const Vec<S> result = t / (t + Vec<S>(2));
  return (typename Raw<S>::Type)((Int)result.v | ((Int)x.v & sign));
}

template <class S>
FUSEDRNN_INLINE Vec<S> relu(Vec<S> x) {
  return greater(x, Vec<S>(0));
}

template <class S>
FUSEDRNN_INLINE Vec<S> relu_gradient(Vec<S> h, Vec<S> d) {
  const Vec<S> zero(0);
  return Vec<S>(h.v <= zero.v ? zero.v : d.v);
}
