// Packing of weights into the panels that products read (gemm.h). Included after it.

// Vector w of a panel of `width` vectors, at a step.
template <class E, class P>
FUSEDRNN_INLINE P* panel_at(P* panel, int64_t steps, int width, int w, int64_t step) {
  const int64_t strip_of = strip_width(width), strip = w / strip_of * strip_of;
  const int64_t vector = strip * steps + step * min64(strip_of, width - strip) + (w - strip);
  return panel + vector * Sums<E>::kLanes * kPair<E>;
}

// Panels of output units `vectors`, from W [kGroup * units, K] whose rows are the outputs:
//   vector (g, v), lane u, inner index k  =  w[(g * units + v * lanes + u) * K + k]
template <int kGroup, class E, class T, class P>
void pack_rows(const T* w, int64_t units, int64_t K, Range vectors, P* panels) {
  constexpr int L = Sums<E>::kLanes, U = kGroupVectors<kGroup>;
  const int64_t steps = steps_of<E>(K);
  for (int64_t v0 = vectors.begin; v0 < vectors.end; v0 += U) {
    const int nv = static_cast<int>(min64(U, vectors.end - v0));
    P* panel = panels + v0 * steps * kGroup * L * kPair<E>;
    for (int i = 0; i < kGroup * nv; ++i) {
      P* to = panel_at<E>(panel, steps, kGroup * nv, i, 0);
      const int64_t pitch = panel_at<E>(panel, steps, kGroup * nv, i, 1) - to, u0 = (v0 + i % nv) * L;
      const T* row = w + (i / nv * units + u0) * K;
      for (int64_t s = 0; s < steps; s += L) {
        const int64_t k = s * kPair<E>;
        Sums<E> square[L];
#pragma GCC unroll 16
        for (int u = 0; u < L; ++u) {
          square[u].v = u0 + u < units ? weight_words_of<E>(row + u * K + k, K - k) : WordsOf<E>{};
        }
        transpose(square);
        for (int j = 0; j < L && s + j < steps; ++j) {
          if constexpr (std::is_same_v<P, E>) store_words(to + (s + j) * pitch, square[j].v);
          else store(to + (s + j) * pitch, square[j]);  // exact: they were of this type
        }
      }
    }
  }
}

// Panels of output columns `vectors`, from W [blocks * K, columns] whose rows are the inner dimension; each block has
// whole steps:
//   vector v, lane u, inner index k of block i  =  w[(i * K + k) * columns + v * lanes + u]
template <class E, class T>
void pack_columns(const T* w, int64_t blocks, int64_t K, int64_t columns, Range vectors, E* panels) {
  constexpr int L = Sums<E>::kLanes, U = kGroupVectors<1>;
  constexpr int64_t kSteps = 16;  // read from end to end before the next: column by column would touch a page a row
  const int64_t steps = steps_of<E>(K);
  for (int64_t s0 = 0; s0 < blocks * steps; s0 += kSteps) {
    for (int64_t v0 = vectors.begin; v0 < vectors.end; v0 += U) {
      const int nv = static_cast<int>(min64(U, vectors.end - v0));
      E* panel = panels + v0 * blocks * steps * L * kPair<E>;
      for (int64_t s = s0; s < min64(blocks * steps, s0 + kSteps); ++s) {
        const int64_t k = s % steps * kPair<E>;
        const T* row = w + (s / steps * K + k) * columns;
        for (int v = 0; v < nv; ++v) {
          const int64_t u = (v0 + v) * L;
          E* to = panel_at<E>(panel, blocks * steps, nv, v, s);
          store_words(to, rows_as_words<E>(row + u, columns, K - k, columns - u));
        }
      }
    }
  }
}
