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

// out[m * ldo + v] = sum_k a[k][m] * b[k][v], or += with `add`, for weight gradients: k runs over rows. `blocks` tiles,
// one below the other: a: [blocks][steps][MR] words; b: [steps][kTileWidth] of vectors; out: [blocks * MR][n], where n
// may end inside a vector.
template <class E, int MR, int NR, class S = typename Sums<E>::Scalar>
void outer_tiles(int64_t blocks, const E* a, const E* b, int64_t steps, S* out, int64_t ldo, int64_t n, bool add) {
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
        for (; j + L <= n; j += L) store(p + j, add ? load(p + j) + load(tile[m] + j) : load(tile[m] + j));
        for (; j < n; ++j) p[j] = add ? p[j] + tile[m][j] : tile[m][j];
      }
      continue;
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v) {
        S* p = out + m * ldo + v * L;
        store(p, Vec<S>(add ? load(p).v + acc[m][v] : acc[m][v]));
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
  using OuterTiles = void (*)(int64_t, const E*, const E*, int64_t, typename Sums<E>::Scalar*, int64_t, int64_t, bool);
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
