// Rows of float32 as int8, for products with int8 weights (operand.h). Included after team.h.
//
// A row is scale * q with |q| <= 127; its sum with a row of weights is scale * scale of the weights * an int32. int8
// has no NaN: the scale of a row with one, or with an infinity, is NaN, and so is all that comes of it.

constexpr float kMostByte = 127, kScaleOfOne = 1 / kMostByte;

// Whether one of the first n lanes is NaN.
FUSEDRNN_INLINE bool has_nan(Vec<float> a, int64_t n) {
  constexpr int L = Vec<float>::kLanes;
  const auto strange = (Raw<float>::Int)(a.v != a.v);
  int32_t found = 0;
  if (__builtin_expect(n < L, 0)) {
    for (int64_t i = 0; i < n; ++i) found |= strange[i];
    return found;
  }
  uint64_t parts[sizeof strange / 8], all = 0;
  __builtin_memcpy(parts, &strange, sizeof strange);
  for (const uint64_t part : parts) all |= part;
  return all;
}

// The largest size of n elements over 127; NaN if one is not finite. 0 if all are so small that it is no normal number.
FUSEDRNN_INLINE float scale_of_row(const float* row, int64_t n) {
  constexpr int L = Vec<float>::kLanes;
  constexpr float kLeast = 1.17549435e-38f;
  Vec<float> most(0), strange(0);
  for (int64_t i = 0; i < n; i += L) {
    const Vec<float> v = load<float>(row + i, n - i);
    strange = strange + (v - v);  // NaN of an infinity too
    most = greater(greater(v, Vec<float>(0) - v), most);
  }
  float scale = 0, nan = 0;
  for (int lane = 0; lane < L; ++lane) {
    scale = most.v[lane] > scale ? most.v[lane] : scale;
    nan += strange.v[lane];
  }
  scale /= kMostByte;
  return (scale < kLeast ? 0 : scale) + nan;
}

// n elements times `factor`, and zeros to the end of the last vector.
FUSEDRNN_INLINE void quantize_row(const float* row, int64_t n, float factor, int8_t* to) {
  constexpr int L = Vec<float>::kLanes;
  for (int64_t i = 0; i < whole_steps<int8_t>(n); i += L) {
    store(to + i, load<float>(row + i, n - i) * Vec<float>(factor));
  }
}

FUSEDRNN_INLINE float factor_of(float scale) { return scale == 0 ? 0 : 1 / scale; }

// What the products of a layer with int8 weights leave, as a number: of a sum, the scales of its units, that of its
// row.
FUSEDRNN_INLINE Vec<float> dequantized(Vec<int32_t> sum, const float* scales, float row) {
  return Vec<float>(__builtin_convertvector(sum.v, Raw<float>::Type)) * load(scales) * Vec<float>(row);
}

// The rows of a team's samples.
struct Int8Rows {
  float* x_scale;                // [chunk rows]
  float *h_scale[2], *h_bad[2];  // [samples]; bad: NaN once an element of the row is, else 0
  float* m_bad;                  // [samples], of what the second product of a step reads

  void carve(Carver& carver, int64_t rows, int64_t samples) {
    x_scale = carver.take<float>(rows);
    for (float*& scale : h_scale) scale = carver.take<float>(samples);
    for (float*& bad : h_bad) bad = carver.take<float>(samples);
    m_bad = carver.take<float>(samples);
  }
  // By any thread that meets a NaN in its own units; once there is one, all later steps of the sample are NaN.
  static void mark(float& bad) {
    const float nan = __builtin_nanf("");
    __atomic_store(&bad, &nan, __ATOMIC_RELAXED);
  }
};
