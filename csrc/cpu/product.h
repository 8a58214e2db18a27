// Rows times weights, packed or as they lie, and what a pass does with each block of the result. Included after gemm.h.

// The inner dimension of a product, in at most two runs of the left operand's columns: then the first is of whole
// steps.
struct Inner {
  int64_t first;       // columns [0, first)
  int64_t second = 0;  // then columns [second_at, second_at + second)
  int64_t second_at = 0;
  FUSEDRNN_INLINE int64_t size() const { return first + second; }
};

constexpr auto nothing_expected = [](int64_t, int64_t, int64_t) {};
constexpr auto nothing_more = [](int64_t, int64_t, const auto*, int) {};

// out[m * pitch], lane u = sum_k a[m][k] * w[u * K + k] for MR rows of the left operand and L rows of w, of which
// `rows` exist: a product without packed weights. Four rows of w at a time, which lie one behind the other in memory,
// are read once for all of them.
constexpr int kDotRows = FUSEDRNN_VECTOR_BYTES == 64 ? 4 : 2;  // with four rows of w, half the registers
template <int MR, class E, class T>
void dot_rows(const E* const* a, int64_t K, const T* w, int64_t rows, Sums<E>* out, int64_t pitch) {
  constexpr int L = Sums<E>::kLanes, kWords = L * kPair<E>, kUnits = L < 4 ? L : 4, kSums = kDotRows / MR;
  Sums<E> total[MR][L];
  for (int u0 = 0; u0 < L; u0 += kUnits) {
    const T* row[kUnits];
    for (int u = 0; u < kUnits; ++u) row[u] = w + min64(u0 + u, rows - 1) * K;
    WordsOf<E> sum[kSums][MR][kUnits] = {};
    const auto step = [&](int64_t k, const auto& words_at, WordsOf<E>(&to)[MR][kUnits]) FUSEDRNN_INLINE_LAMBDA {
      WordsOf<E> x[MR];
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) x[m] = words_at(a[m] + k, false);
#pragma GCC unroll 4
      for (int u = 0; u < kUnits; ++u) {
        const WordsOf<E> own = words_at(row[u] + k, true);
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) add_product<E>(to[m][u], x[m], own);
      }
    };
    int64_t k = 0;
    const auto whole = [&](const auto* p, bool weights)
                           FUSEDRNN_INLINE_LAMBDA { return weights ? weight_words_of<E>(p) : words_of<E>(p); };
    for (; k + kSums * kWords <= K; k += kSums * kWords) {
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) step(k + i * kWords, whole, sum[i]);
    }
    for (; k < K; k += kWords) {
      const auto part = [&](const auto* p, bool weights) FUSEDRNN_INLINE_LAMBDA {
        return weights ? weight_words_of<E>(p, K - k) : words_of<E>(p, K - k);
      };
      step(k, part, sum[0]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnits; ++u) {
        total[m][u0 + u].v = sum[0][m][u];
#pragma GCC unroll 4
        for (int i = 1; i < kSums; ++i) total[m][u0 + u].v += sum[i][m][u];
      }
    }
  }
  for (int m = 0; m < MR; ++m) out[m * pitch] = sums_of_lanes(total[m]);
}

template <class E, class T>
void dot_rows(const E* const* a, int64_t n, int64_t K, const T* w, int64_t rows, Sums<E>* out, int64_t pitch) {
  int64_t r = 0;
  for (; kDotRows == 4 && r + 4 <= n; r += 4) dot_rows<kDotRows>(a + r, K, w, rows, out + r * pitch, pitch);
  for (; r + 2 <= n; r += 2) dot_rows<2>(a + r, K, w, rows, out + r * pitch, pitch);
  if (r < n) dot_rows<1>(a + r, K, w, rows, out + r * pitch, pitch);
}

// out[m * pitch + v] = sum_k a[m][k] * w[k * columns + v * lanes + lane] for MR rows and NV vectors, of whose columns
// `left` exist: a product with weights as they lie, whose rows are the inner dimension.
template <class E>
struct RowsInRuns {
  const E* const* first;
  const E* const* second;
  const Inner& inner;
};
template <int MR, int NV, class E>
void few_rows_product(RowsInRuns<E> a, const E* w, int64_t columns, int64_t left, Sums<E>* out, int64_t pitch) {
  constexpr int L = Sums<E>::kLanes;
  Sums<E> sum[MR][NV];
  for (int m = 0; m < MR; ++m) {
    for (int v = 0; v < NV; ++v) sum[m][v] = Sums<E>(0);
  }
  const auto run = [&](const E* const* row, int64_t K) FUSEDRNN_INLINE_LAMBDA {
    for (int64_t k = 0; k < K; ++k, w += columns) {
      Sums<E> own[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) own[v] = load<E>(w + v * L, left - v * L);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) {
        const Sums<E> same(row[m][k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[m][v] = sum[m][v] + same * own[v];
      }
    }
  };
  run(a.first, a.inner.first);
  run(a.second, a.inner.second);
  for (int m = 0; m < MR; ++m) {
    for (int v = 0; v < NV; ++v) out[m * pitch + v] = sum[m][v];
  }
}

template <int NV, class E>
void few_rows_product(RowsInRuns<E> a, int64_t n, const E* w, int64_t columns, int64_t left, Sums<E>* out,
                      int64_t pitch) {
  int64_t r = 0;
  const auto from = [&](int64_t row) { return RowsInRuns<E>{a.first + row, a.second + row, a.inner}; };
  for (; r + 4 <= n; r += 4) few_rows_product<4, NV>(from(r), w, columns, left, out + r * pitch, pitch);
  for (; r + 2 <= n; r += 2) few_rows_product<2, NV>(from(r), w, columns, left, out + r * pitch, pitch);
  if (r < n) few_rows_product<1, NV>(from(r), w, columns, left, out + r * pitch, pitch);
}

// The right operand of a product: packed panels, or, for a few rows that are not worth the packing, W itself.
template <class E, class T, class P = E>
struct Weights {
  const P* panels;
  const T* rows;  // [kGroup * units][K], null if packed
  int64_t units;
  const T* columns = nullptr;  // [K][units], likewise
};

// Of rows that are multiplied before their epilogue.
constexpr int64_t kBlockRows = kBlockBytes / (kPanelWidth * FUSEDRNN_VECTOR_BYTES);

// A block of rows times the weights of `vectors`, panel after panel: the results of a panel of nv vectors are
// [n][kGroup][nv]. They know of no cell, so they are compiled once for all of them. With weights as they lie, by their
// columns:
template <class E>
__attribute__((noinline)) void product_by_columns(const Weights<E, E>& weights, const Inner& inner, Range vectors,
                                                  const E* const* rows, int64_t n, Sums<E>* results) {
  constexpr int U = kGroupVectors<1>, L = Sums<E>::kLanes;
  const E* second[kBlockRows];
  for (int64_t r = 0; r < n; ++r) second[r] = rows[r] + inner.second_at;
  for (int64_t v0 = vectors.begin; v0 < vectors.end; v0 += U) {
    const int width = static_cast<int>(min64(U, vectors.end - v0));
    const auto vectors_of = [&](auto count, int v) FUSEDRNN_INLINE_LAMBDA {
      const int64_t at = (v0 + v) * L;
      few_rows_product<count()>(RowsInRuns<E>{rows, second, inner}, n, weights.columns + at, weights.units,
                                weights.units - at, results + v, width);
    };
    int v = 0;
    for (; v + 4 <= width; v += 4) vectors_of(std::integral_constant<int, 4>(), v);
    for (; v < width; ++v) vectors_of(std::integral_constant<int, 1>(), v);
    results += n * width;
  }
}

// By their rows, in one run:
template <int kGroup, class E, class T, class P>
__attribute__((noinline)) void product_by_rows(const Weights<E, T, P>& weights, int64_t K, Range vectors,
                                               const E* const* rows, int64_t n, Sums<E>* results) {
  constexpr int U = kGroupVectors<kGroup>, L = Sums<E>::kLanes;
  for (int64_t v0 = vectors.begin; v0 < vectors.end; v0 += U) {
    const int nv = static_cast<int>(min64(U, vectors.end - v0)), width = kGroup * nv;
    for (int w = 0; w < width; ++w) {
      const int64_t u = (v0 + w % nv) * L;
      const T* own = weights.rows + (w / nv * weights.units + u) * K;
      dot_rows(rows, n, K, own, weights.units - u, results + w, width);
    }
    for (int64_t r = 0; r < n && kUnsignedWeights<E>; ++r) {
      const WordsOf<E> start = start_of_sums(rows[r], K);
      for (int w = 0; w < width; ++w) results[r * width + w].v += start;
    }
    results += n * width;
  }
}

// Packed:
template <int kGroup, class E, class P>
__attribute__((noinline)) void product_by_panels(const P* panels, const Inner& inner, Range vectors,
                                                 const E* const* rows, int64_t n, Sums<E>* results) {
  constexpr int U = kGroupVectors<kGroup>, kWords = Sums<E>::kLanes * kPair<E>;
  static_assert(kGroup * U <= kPanelWidth, "a cell with more gates needs a wider panel");
  const E* second[kBlockRows];
  for (int64_t r = 0; r < n && inner.second; ++r) second[r] = rows[r] + inner.second_at;
  [[maybe_unused]] Sums<E> start[kUnsignedWeights<E> ? kBlockRows : 1];
  for (int64_t r = 0; r < n && kUnsignedWeights<E>; ++r) start[r].v = start_of_sums(rows[r], inner.first);
  const int64_t first_steps = steps_of<E>(inner.first), steps = first_steps + steps_of<E>(inner.second);
  for (int64_t v0 = vectors.begin; v0 < vectors.end; v0 += U) {
    const int nv = static_cast<int>(min64(U, vectors.end - v0)), width = kGroup * nv;
    const P* panel = panels + v0 * steps * kGroup * kWords;
#if defined(FUSEDRNN_AMX)
    if (n > kFewRows) {
      static_assert(kPanelWidth == kTileWidth, "a panel is one strip");
      const int64_t distance = (rows[1] - rows[0]) * static_cast<int64_t>(sizeof(E)), pitch = width * kTileBytes;
      const auto run = [&](const E* from, const E* strip, int64_t count, bool accumulate) FUSEDRNN_INLINE_LAMBDA {
        tile_products(n, width, tile_source(from, distance), tile_source(strip, pitch), count / kTileRows,
                      tile_sums(results, pitch), accumulate);
      };
      run(rows[0], panel, first_steps, false);
      if (inner.second) run(second[0], panel + first_steps * width * kWords, steps - first_steps, true);
      results += n * width;
      continue;
    }
#endif
    const int64_t whole = strip_width(width), pitch = whole * steps * kWords;
    for (int64_t w = 0, nr = 0; w < width; w += nr) {
      const int64_t left = width - w, own = min64(left, whole);
      const int64_t strips = n > kFewRows ? 1 : max64(1, min64(left, kFewSums / n) / whole);
      nr = strips * own;
      const P* strip = panel + w * steps * kWords;
      const P* rest = strip + first_steps * own * kWords;  // of each strip
      for_row_blocks({0, n}, max_rows(static_cast<int>(own)), [&](int64_t r, int mr) {
        const auto tile = Tiles<E, P>::row_tile_of(static_cast<int>(strips), static_cast<int>(own), mr);
        Sums<E>* to = results + r * width + w;
        for (int64_t sum = 0; sum < mr * nr && kUnsignedWeights<E>; ++sum) {
          to[sum / nr * width + sum % nr] = start[r + sum / nr];
        }
        tile(rows + r, first_steps, strip, pitch, to, width, kUnsignedWeights<E>);
        if (inner.second) tile(second + r, steps - first_steps, rest, pitch, to, width, true);
      });
    }
    results += n * width;
  }
}

template <int kGroup, class E, class T, class P>
FUSEDRNN_INLINE void block_product(const Weights<E, T, P>& weights, const Inner& inner, Range vectors,
                                   const E* const* rows, int64_t n, Sums<E>* results) {
  if constexpr (kGroup == 1 && kPair<E> == 1 && std::is_same_v<E, T> && std::is_same_v<E, P>) {
    if (weights.columns) return product_by_columns(weights, inner, vectors, rows, n, results);
  }
  if (weights.rows) return product_by_rows<kGroup>(weights, inner.first, vectors, rows, n, results);
  product_by_panels<kGroup>(weights.panels, inner, vectors, rows, n, results);
}

// Rows times weights: for each own vector v and each row r, epilogue(r, v, acc, stride): gate g of the product is
// acc[g * stride]. A block of rows meets one strip after another, a few rows one panel after another; then, while the
// product is in the first-level cache, comes the epilogue, for the whole block. What it leaves in acc is there for
// second(r, v, acc, stride), which follows for the whole block again.
//   a(r): pointer to row r of the left operand
//   expect(r, u, n): prefetches what the epilogue will touch of row r, elements [u, u + n); called before the product
template <int kGroup, class E, class T, class P, class RowPointer, class Expect, class Epilogue, class Second>
FUSEDRNN_INLINE void product(const Weights<E, T, P>& weights, Inner inner, Range vectors, Range rows,
                             const RowPointer& a, const Expect& expect, const Epilogue& epilogue,
                             const Second& second) {
  constexpr int U = kGroupVectors<kGroup>, L = Sums<E>::kLanes;
  Sums<E> out[(kBlockRows + kRowsAhead) * kPanelWidth];
  const E* row[kBlockRows];
  const int64_t blocks = ceil_div(rows.size(), kBlockRows);
  const int64_t panels = max64(1, 16 / max64(1, rows.size()));  // that share a block
  for (int64_t first = vectors.begin; first < vectors.end; first += panels * U) {
    const int64_t last = min64(vectors.end, first + panels * U);
    for (int64_t i = 0; i < blocks; ++i) {
      const Range block = part(rows.size(), i, blocks);
      const int64_t r0 = rows.begin + block.begin, n = block.size();
      for (int64_t r = 0; r < n; ++r) {
        row[r] = a(r0 + r);
        expect(r0 + r, first * L, (last - first) * L);
      }
      block_product<kGroup>(weights, inner, {first, last}, row, n, out);
      const Timed timed(Phase::kCell);
      const auto each = [&](const auto& body) FUSEDRNN_INLINE_LAMBDA {
        Sums<E>* acc = out;
        for (int64_t v0 = first; v0 < last; v0 += U) {
          const int nv = static_cast<int>(min64(U, last - v0));
          for (int64_t r = 0; r < n; ++r, acc += kGroup * nv) {
            for (int v = 0; v < nv; ++v) body(r0 + r, v0 + v, acc + v, nv);
          }
        }
      };
      each(epilogue);
      if constexpr (!std::is_same_v<Second, decltype(nothing_more)>) each(second);
    }
  }
}

template <int kGroup, class E, class T, class P, class RowPointer, class Expect, class Epilogue>
FUSEDRNN_INLINE void product(const Weights<E, T, P>& weights, Inner inner, Range vectors, Range rows,
                             const RowPointer& a, const Expect& expect, const Epilogue& epilogue) {
  product<kGroup>(weights, inner, vectors, rows, a, expect, epilogue, nothing_more);
}
