// The functions of ../cells/functions.h on vectors. Included after vec.h.
// Accuracy, measured against a wider type (tests/test_user_layers.py): exp 1.5 ulp, log 2 ulp, softplus 3 ulp.
// An exp below the normal numbers, or within a thousandth of the least, is 0.

template <class S>
struct Logarithm;
template <>
struct Logarithm<float> {
  static constexpr float kLeastNormal = 1.17549435e-38f, kUp = 8388608.0f;  // 2^23
  static constexpr int kUpBits = 23, kTerms = 6, kTermsOfFraction = 9;      // what is left out is below 2^-26
  static constexpr int32_t kMantissaBits = 0x7fffff, kOne = 0x3f800000;
  static constexpr float kLeastExp = -87.336f, kMostExp = 89.0f;
};
template <>
struct Logarithm<double> {
  static constexpr double kLeastNormal = 2.2250738585072014e-308, kUp = 4503599627370496.0;  // 2^52
  static constexpr int kUpBits = 52, kTerms = 12, kTermsOfFraction = 18;                     // below 2^-56
  static constexpr int64_t kMantissaBits = 0xfffffffffffff, kOne = 0x3ff0000000000000;
  static constexpr double kLeastExp = -708.39, kMostExp = 710.0;
};

// What a comparison gives: all bits of a lane, or none.
template <class S>
struct Lanes {
  typename Raw<S>::Int bits;
};
template <class S>
FUSEDRNN_INLINE Lanes<S> operator<(Vec<S> a, Vec<S> b) {
  return {a.v < b.v};
}
template <class S>
FUSEDRNN_INLINE Lanes<S> operator<=(Vec<S> a, Vec<S> b) {
  return {a.v <= b.v};
}
template <class S>
FUSEDRNN_INLINE Vec<S> where(Lanes<S> condition, Vec<S> a, Vec<S> b) {
  return Vec<S>(condition.bits ? a.v : b.v);
}

template <class S>
FUSEDRNN_INLINE Vec<S> abs(Vec<S> x) {
  using Int = typename Raw<S>::Int;
  return (typename Raw<S>::Type)((Int)x.v & ~(Int)Vec<S>(S(-0.0)).v);
}

template <class S>
FUSEDRNN_INLINE Vec<S> maximum(Vec<S> a, Vec<S> b) {
  return Vec<S>((a.v < b.v) | (b.v != b.v) ? b.v : a.v);
}

template <class S>
FUSEDRNN_INLINE Vec<S> minimum(Vec<S> a, Vec<S> b) {
  return Vec<S>((b.v < a.v) | (b.v != b.v) ? b.v : a.v);
}

template <class S>
FUSEDRNN_INLINE Vec<S> sqrt(Vec<S> x) {
  for (int lane = 0; lane < Vec<S>::kLanes; ++lane) x.v[lane] = square_root(x.v[lane]);
  return x;
}

// 2^n (e^r - 1) + 2^n, where x is not negative as twice that with 2^(n-1), for 2^n may overflow where e^x does not.
template <class S>
FUSEDRNN_INLINE Vec<S> exp(Vec<S> x) {
  using Int = typename Raw<S>::Int;
  using Type = typename Raw<S>::Type;
  const Vec<S> least(Logarithm<S>::kLeastExp), most(Logarithm<S>::kMostExp), zero(0);
  const Lanes<S> negative = x < zero;
  Vec<S> half_two_n;
  const Vec<S> m = expm1_reduced<1>(greater(lesser(x, most), least), half_two_n);
  const Int doubled = ((Int)half_two_n.v) + (negative.bits & ((Int{} + 1) << Exp<S>::kMantissa));
  const Vec<S> times = where(negative, Vec<S>(1), Vec<S>(2));
  return where(x < least, zero, (m * times + times) * Vec<S>((Type)doubled));
}

// 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...)
template <int terms, class S>
FUSEDRNN_INLINE Vec<S> twice_artanh(Vec<S> s) {
  const Vec<S> u = s * s;
  Vec<S> p(S(2) / (2 * terms + 1));
  for (int k = terms - 1; k > 0; --k) p = p * u + Vec<S>(S(2) / (2 * k + 1));
  return p * u * s + (s + s);
}

// x = 2^n m, m from sqrt(1/2) to sqrt(2): n ln 2 + 2 artanh((m - 1) / (m + 1)).
template <class S>
FUSEDRNN_INLINE Vec<S> log(Vec<S> x) {
  using L = Logarithm<S>;
  using E = Exp<S>;
  using Int = typename Raw<S>::Int;
  using Type = typename Raw<S>::Type;
  const Vec<S> zero(0), one(1), infinity{S(__builtin_inf())}, half{S(0.5)};
  const Lanes<S> small = x < Vec<S>(L::kLeastNormal);
  const Int bits = (Int)where(small, x * Vec<S>(L::kUp), x).v;
  Vec<S> m((Type)((bits & L::kMantissaBits) | L::kOne));
  // The exponent as a number: its bits in the low ones of kRound.
  Vec<S> n = Vec<S>((Type)((bits >> E::kMantissa) - E::kBias + E::kRoundBits)) - Vec<S>(E::kRound);
  n = n - where(small, Vec<S>(S(L::kUpBits)), zero);
  const Lanes<S> upper = Vec<S>(S(1.41421356237309505)) < m;
  m = where(upper, m * half, m);
  n = where(upper, n + one, n);
  const Vec<S> found =
      n * Vec<S>(E::kLn2High) + (n * Vec<S>(E::kLn2Low) + twice_artanh<L::kTerms>((m - one) / (m + one)));
  const Vec<S> below = where(x < zero, Vec<S>{S(__builtin_nan(""))}, zero - infinity);
  return where(zero < x, where(x < infinity, found, x), where(x <= zero, below, x));
}

template <class S>
FUSEDRNN_INLINE Vec<S> softplus(Vec<S> x) {  // relu(x) + log(1 + t), t = e^-|x|
  const Vec<S> t = exp(Vec<S>(0) - abs(x));
  return relu(x) + twice_artanh<Logarithm<S>::kTermsOfFraction>(t / (t + Vec<S>(2)));
}
