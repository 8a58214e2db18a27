// Register tiles of the matrix products, and the packed panels they read. Included after vec.h.
//
// A panel holds the weights of a few output vectors: nv vectors of units for each of kGroup gates, W = kGroup * nv
// vectors numbered g * nv + v, nv <= kGroupVectors<kGroup>. It is cut into strips as wide as a register tile:
//   strip [steps][width][lanes], width = strip_width(W), the last one narrower where that does not divide W.
// A step is an index of the inner dimension, or two, with bfloat16 operands (operand.h). A panel that begins at vector
// v0 begins at word v0 * steps * kGroup * lanes: panels of any widths follow one another without a table. Lanes past
// the last unit are zero here; what a product leaves in such lanes is undefined. Panels of bfloat16 are read as
// float32, where the weights alone are bfloat16.
//
// Tile sizes: as many accumulators as the registers hold, few loads a multiply-add, no spills (docs/performance.md).

#if FUSEDRNN_VECTOR_BYTES == 64  // 32 registers
constexpr int kTileWidth = 4;    // vectors
constexpr int max_rows(int nr) { return nr == 4 ? 6 : 8; }
#elif FUSEDRNN_VECTOR_BYTES == 32  // 16: twelve accumulators, a row of the strip, one broadcast
constexpr int kTileWidth = 3;
constexpr int max_rows(int nr) { return nr == 3 ? 4 : 6; }
#else
// 16, of which one holds a product before it is added
constexpr int kTileWidth = 2;
constexpr int max_rows(int) { return 6; }
#endif

constexpr int kOuterRows = max_rows(kTileWidth);  // of the tiles of weight gradients

#define FUSEDRNN_INLINE_LAMBDA __attribute__((always_inline))

constexpr int group_vectors(int group) {
  if (kTileWidth == 4) return group >= 3 ? 1 : 4 / group;  // one strip
  int n = 1;                                               // whole strips, two or more
  while (group * n % kTileWidth || group * n < 2 * kTileWidth) ++n;
  return n;
}
template <int kGroup>
constexpr int kGroupVectors = group_vectors(kGroup);
constexpr int kPanelWidth = kTileWidth == 3 ? 12 : kTileWidth == 2 ? 6 : 4;  // the widest panel, in vectors

// One or two rows are multiplied by several strips at once: each of their elements then serves more vectors. At most so
// many sums are made at a time.
constexpr int kFewRows = 2, kFewSums = 12;
#if defined(FUSEDRNN_AMX)
constexpr int64_t kBlockBytes = 24 << 10;  // of results, until the epilogue takes them; panels are read once a block
#else
constexpr int64_t kBlockBytes = 12 << 10;
#endif

struct Range {
  int64_t begin, end;
  FUSEDRNN_INLINE int64_t size() const { return end - begin; }
};

// Part i of n equal parts of [0, total).
FUSEDRNN_INLINE Range part(int64_t total, int64_t i, int64_t n) { return {total * i / n, total * (i + 1) / n}; }

FUSEDRNN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDRNN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int min_int(int a, int b) { return a < b ? a : b; }

// Of a panel of so many vectors, cut into as few strips as can be: four vectors are 2 + 2, not 3 + 1.
FUSEDRNN_INLINE int64_t strip_width(int64_t width) { return ceil_div(width, ceil_div(width, kTileWidth)); }

// out[m * ldo + v] (+)= sum_k a[m][k] * b[k][v].  b: strips [steps][W] of vectors, each `pitch` elements after the last
template <class E, class P, int MR, int W, int kStrips>
void row_tile(const E* const* a, int64_t steps, const P* b, int64_t pitch, Sums<E>* out, int ldo, bool accumulate) {
  using Type = WordsOf<E>;
  constexpr int kWords = Sums<E>::kLanes * kPair<E>, NR = W * kStrips;
  // Eight sums or so hide the latency of the FMA units: small tiles make several over k.
  constexpr int kSums = MR * NR <= 2 ? 4 : MR * NR <= 6 ? 2 : 1;
  Type acc[kSums][MR][NR];
  const E* row[MR];
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m) {
    row[m] = a[m];
#pragma GCC unroll 12
    for (int v = 0; v < NR; ++v) {
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) acc[i][m][v] = accumulate && i == 0 ? out[m * ldo + v].v : Type{};
    }
  }
  const auto step = [&](int64_t k, Type(&sum)[MR][NR]) FUSEDRNN_INLINE_LAMBDA {
    Type bv[NR];
#pragma GCC unroll 12
    for (int v = 0; v < NR; ++v) bv[v] = words_of<E>(b + v / W * pitch + v % W * kWords);
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      const Type am = same_words(row[m] + k * kPair<E>);
#pragma GCC unroll 12
      for (int v = 0; v < NR; ++v) {
        if constexpr (kStrips == 1) multiply_add<E>(sum[m][v], am, bv[v]);
        else add_product<E>(sum[m][v], am, bv[v]);  // more vectors than registers: operands in memory
      }
    }
    b += W * kWords;
  };
  constexpr int kSteps = kSums > 1 ? kSums : 2;  // two at least: where two threads share a core, decoding is the limit
  int64_t k = 0;
  for (; k + kSteps <= steps; k += kSteps) {
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) step(k + i, acc[i % kSums]);
  }
  for (; k < steps; ++k) step(k, acc[0]);
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 12
    for (int v = 0; v < NR; ++v) {
#pragma GCC unroll 4
      for (int i = 1; i < kSums; ++i) acc[0][m][v] += acc[i][m][v];
      out[m * ldo + v].v = acc[0][m][v];
    }
  }
}

// out[m * ldo + v] += sum_k a[k][m] * b[k][v], for weight gradients: k runs over rows. `blocks` tiles, one below the
// other: a: [blocks][steps][MR] words; b: [steps][kTileWidth] of vectors; out: [blocks * MR][n], where n may end inside
// a vector.
template <class E, int MR, int NR, class S = typename Sums<E>::Scalar>
void outer_tiles(int64_t blocks, const E* a, const E* b, int64_t steps, S* out, int64_t ldo, int64_t n) {
  using Type = WordsOf<E>;
  constexpr int L = Vec<S>::kLanes, kWords = L * kPair<E>;
  for (int64_t i = 0; i < blocks; ++i, out += MR * ldo) {
    Type acc[MR][NR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      prefetch_to_write(out + m * ldo, NR * L);
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v) acc[m][v] = Type{};
    }
    const E* row = b;
#pragma GCC unroll 2
    for (int64_t k = 0; k < steps; ++k, a += MR * kPair<E>, row += kTileWidth * kWords) {
      Type bv[NR];
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v) bv[v] = load_words(row + v * kWords);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Type am = same_words(a + m * kPair<E>);
#pragma GCC unroll 4
        for (int v = 0; v < NR; ++v) multiply_add<E>(acc[m][v], am, bv[v]);
      }
    }
    if (n < NR * L) {  // the last columns
      alignas(64) S tile[MR][NR * L];
      __builtin_memcpy(tile, acc, sizeof tile);
      for (int m = 0; m < MR; ++m) {
        S* p = out + m * ldo;
        int64_t j = 0;
        for (; j + L <= n; j += L) store(p + j, load(p + j) + load(tile[m] + j));
        for (; j < n; ++j) p[j] += tile[m][j];
      }
      continue;
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v) {
        S* p = out + m * ldo + v * L;
        store(p, Vec<S>(load(p).v + acc[m][v]));
      }
    }
  }
}

// to: [steps][MR] words, the first MR columns of a's K rows, together; a row that is missing in the last one is zero.
// (A copy of mr columns would become a call of memcpy a row.)
template <class E, int MR>
void copy_columns(const E* a, int64_t lda, int64_t K, E* to) {
  constexpr int P = kPair<E>;
  int64_t k = 0;
  for (; k + P <= K; k += P, a += P * lda, to += P * MR) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < P; ++i) to[m * P + i] = a[i * lda + m];
    }
  }
  for (; k < whole_steps<E>(K); k += P, a += P * lda, to += P * MR) {
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < P; ++i) to[m * P + i] = k + i < K ? a[i * lda + m] : E{};
    }
  }
}

// The tile functions, by their sizes. P: what panels are stored as.
template <class E, class P = E>
struct Tiles {
  using RowTile = void (*)(const E* const*, int64_t, const P*, int64_t, Sums<E>*, int, bool);
  using OuterTiles = void (*)(int64_t, const E*, const E*, int64_t, typename Sums<E>::Scalar*, int64_t, int64_t);
  using Copy = void (*)(const E*, int64_t, int64_t, E*);
  template <int n>
  using Sizes = std::make_integer_sequence<int, n>;
  template <int W>  // strips in the widest panel whose strips are all of this width
  static constexpr int kMostStrips = W == kTileWidth             ? kPanelWidth / W
                                     : W == 1 || kTileWidth == 4 ? 1
                                                                 : 2;

  template <int W = kTileWidth, int kStrips = kMostStrips<W>>
  static RowTile row_tile_of(int strips, int width, int mr) {
    if constexpr (W > 1) {
      if (width < W) return row_tile_of<W - 1>(strips, width, mr);
    }
    if constexpr (kStrips > 1) {
      if (strips < kStrips) return row_tile_of<W, kStrips - 1>(strips, width, mr);
      return row_tile_of<W, kStrips>(mr, Sizes<min_int(kFewRows, kFewSums / (W * kStrips))>());
    }
    return row_tile_of<W, 1>(mr, Sizes<max_rows(W)>());
  }
  template <int NR = kTileWidth>
  static OuterTiles outer_tiles_of(int nr, int mr) {
    if constexpr (NR > 1) {
      if (nr < NR) return outer_tiles_of<NR - 1>(nr, mr);
    }
    return outer_tiles_of<NR>(mr, Sizes<kOuterRows>());
  }
  static Copy copy_of(int mr) { return copy_of(mr, Sizes<kOuterRows>()); }

 private:
  template <int W, int kStrips, int... M>
  static RowTile row_tile_of(int mr, std::integer_sequence<int, M...>) {
    static constexpr RowTile table[] = {row_tile<E, P, M + 1, W, kStrips>...};
    return table[mr - 1];
  }
  template <int NR, int... M>
  static OuterTiles outer_tiles_of(int mr, std::integer_sequence<int, M...>) {
    static constexpr OuterTiles table[] = {outer_tiles<E, M + 1, NR>...};
    return table[mr - 1];
  }
  template <int... M>
  static Copy copy_of(int mr, std::integer_sequence<int, M...>) {
    static constexpr Copy table[] = {copy_columns<E, M + 1>...};
    return table[mr - 1];
  }
};

// body(first row, rows) over blocks of nearly equal size, none above `most`.
template <class Body>
FUSEDRNN_INLINE void for_row_blocks(Range rows, int64_t most, const Body& body) {
  const int64_t blocks = ceil_div(rows.size(), most);
  for (int64_t i = 0; i < blocks; ++i) {
    const Range r = part(rows.size(), i, blocks);
    body(rows.begin + r.begin, static_cast<int>(r.size()));
  }
}

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

// out[u] = sum_k a[k] * w[u * K + k] for L rows of w, of which `rows` exist: a product without packed weights.
template <class E, class T>
Sums<E> dot_rows(const E* a, int64_t K, const T* w, int64_t rows) {
  constexpr int L = Sums<E>::kLanes, kWords = L * kPair<E>, kSums = L < 8 ? 8 / L : 1;  // eight or more, as in row_tile
  const T* row[L];
  for (int u = 0; u < L; ++u) row[u] = w + (u < rows ? u : rows - 1) * K;
  WordsOf<E> sum[kSums][L] = {};
  int64_t k = 0;
  for (; k + kSums * kWords <= K; k += kSums * kWords) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const WordsOf<E> x = load_words(a + k + i * kWords);
#pragma GCC unroll 16
      for (int u = 0; u < L; ++u) add_product<E>(sum[i][u], x, weight_words_of<E>(row[u] + k + i * kWords));
    }
  }
  for (; k < K; k += kWords) {  // what is past the end is zero in both
    const WordsOf<E> x = words_of<E>(a + k, K - k);
    for (int u = 0; u < L; ++u) add_product<E>(sum[0][u], x, weight_words_of<E>(row[u] + k, K - k));
  }
  Sums<E> total[L];
#pragma GCC unroll 16
  for (int u = 0; u < L; ++u) {
    total[u].v = sum[0][u];
#pragma GCC unroll 4
    for (int i = 1; i < kSums; ++i) total[u].v += sum[i][u];
  }
  return sums_of_lanes(total);
}

// The same of int8 for MR rows of the left operand, out[m] for each: four rows of w at a time, which lie one behind the
// other in memory, and are read once for all of them.
template <int MR, class E, class T>
void dot_rows_of_bytes(const E* const* a, int64_t K, const T* w, int64_t rows, Sums<E>* out, int64_t pitch) {
  constexpr int L = Sums<E>::kLanes, kWords = L * kPair<E>, kUnits = L < 4 ? L : 4, kSums = 4 / MR;
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
void dot_rows_of_bytes(const E* const* a, int64_t n, int64_t K, const T* w, int64_t rows, Sums<E>* out, int64_t pitch) {
  int64_t r = 0;
  for (; r + 4 <= n; r += 4) dot_rows_of_bytes<4>(a + r, K, w, rows, out + r * pitch, pitch);
  for (; r + 2 <= n; r += 2) dot_rows_of_bytes<2>(a + r, K, w, rows, out + r * pitch, pitch);
  if (r < n) dot_rows_of_bytes<1>(a + r, K, w, rows, out + r * pitch, pitch);
}

// The right operand of a product: packed panels, or, for a few rows that are not worth the packing, W itself.
template <class E, class T, class P = E>
struct Weights {
  const P* panels;
  const T* rows;  // [kGroup * units][K], null if packed
  int64_t units;
};

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
  constexpr int U = kGroupVectors<kGroup>, L = Sums<E>::kLanes, kWords = L * kPair<E>;
  constexpr int64_t kBlockRows = kBlockBytes / (kPanelWidth * FUSEDRNN_VECTOR_BYTES);
  static_assert(kGroup * U <= kPanelWidth, "a cell with more gates needs a wider panel");
  Sums<E> out[(kBlockRows + kRowsAhead) * kPanelWidth];
  const E* row[2][kBlockRows];
  [[maybe_unused]] Sums<E> start[kUnsignedWeights<E> ? kBlockRows : 1];
  const int64_t first_steps = steps_of<E>(inner.first), steps = first_steps + steps_of<E>(inner.second);
  const int64_t blocks = ceil_div(rows.size(), kBlockRows);
  const int64_t panels = max64(1, 16 / max64(1, rows.size()));  // that share a block
  for (int64_t first = vectors.begin; first < vectors.end; first += panels * U) {
    const int64_t last = min64(vectors.end, first + panels * U);
    for (int64_t i = 0; i < blocks; ++i) {
      const Range block = part(rows.size(), i, blocks);
      const int64_t r0 = rows.begin + block.begin, n = block.size();
      for (int64_t r = 0; r < n; ++r) {
        row[0][r] = a(r0 + r);
        row[1][r] = row[0][r] + inner.second_at;
        if constexpr (kUnsignedWeights<E>) start[r].v = start_of_sums(row[0][r], inner.first);
        expect(r0 + r, first * L, (last - first) * L);
      }
      Sums<E>* results = out;
      for (int64_t v0 = first; v0 < last; v0 += U) {
        const int nv = static_cast<int>(min64(U, last - v0)), width = kGroup * nv;
        const P* panel = weights.rows ? nullptr : weights.panels + v0 * steps * kGroup * kWords;
        for (int w = 0; w < width && weights.rows; ++w) {
          const int64_t u = (v0 + w % nv) * L;
          const T* own = weights.rows + (w / nv * weights.units + u) * inner.first;
          if constexpr (kPair<E> == 4) {
            dot_rows_of_bytes(row[0], n, inner.first, own, weights.units - u, results + w, width);
            for (int64_t r = 0; r < n && kUnsignedWeights<E>; ++r) results[r * width + w].v += start[r].v;
          } else {
            for (int64_t r = 0; r < n; ++r) {
              results[r * width + w] = dot_rows(row[0][r], inner.first, own, weights.units - u);
            }
          }
        }
#if defined(FUSEDRNN_AMX)
        if (!weights.rows && n > kFewRows) {
          static_assert(kPanelWidth == kTileWidth, "a panel is one strip");
          const int64_t distance = (row[0][1] - row[0][0]) * static_cast<int64_t>(sizeof(E)),
                        pitch = width * kTileBytes;
          const auto run = [&](const E* from, const E* strip, int64_t count, bool accumulate) FUSEDRNN_INLINE_LAMBDA {
            tile_products(n, width, tile_source(from, distance), tile_source(strip, pitch), count / kTileRows,
                          tile_sums(results, pitch), accumulate);
          };
          run(row[0][0], panel, first_steps, false);
          if (inner.second) run(row[1][0], panel + first_steps * width * kWords, steps - first_steps, true);
          results += n * width;
          continue;
        }
#endif
        const int64_t whole = strip_width(width), pitch = whole * steps * kWords;
        for (int64_t w = 0, nr = 0; w < width && !weights.rows; w += nr) {
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
            tile(row[0] + r, first_steps, strip, pitch, to, width, kUnsignedWeights<E>);
            if (inner.second) tile(row[1] + r, steps - first_steps, rest, pitch, to, width, true);
          });
        }
        results += n * width;
      }
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
