// Register tiles of the matrix products, and the packed panels they read. Included after vec.h.
//
// A panel holds the weights of a few output vectors: nv vectors of units for each of kGroup gates, W = kGroup * nv
// vectors numbered g * nv + v, nv <= kGroupVectors<kGroup>. It is cut into strips as wide as a register tile:
//   strip [K][width][lanes], width = strip_width(W), the last one narrower where that does not divide W.
// A panel that begins at vector v0 begins at element v0 * K * kGroup * lanes: panels of any widths follow one
// another without a table. Lanes past the last unit are zero here; what a product leaves in such lanes is undefined.
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

struct Range {
  int64_t begin, end;
  FUSEDRNN_INLINE int64_t size() const { return end - begin; }
};

// Part i of n equal parts of [0, total).
FUSEDRNN_INLINE Range part(int64_t total, int64_t i, int64_t n) { return {total * i / n, total * (i + 1) / n}; }

FUSEDRNN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FUSEDRNN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDRNN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int min_int(int a, int b) { return a < b ? a : b; }

// Of a panel of so many vectors, cut into as few strips as can be: four vectors are 2 + 2, not 3 + 1.
FUSEDRNN_INLINE int64_t strip_width(int64_t width) { return ceil_div(width, ceil_div(width, kTileWidth)); }

// out[m * ldo + v] (+)= sum_k a[m][k] * b[k][v].      b: strips [K][W] of vectors, each `pitch` elements after the last
template <class S, int MR, int W, int kStrips>
void row_tile(const S* const* a, int64_t K, const S* b, int64_t pitch, Vec<S>* out, int ldo, bool accumulate) {
  using Type = typename Raw<S>::Type;
  constexpr int L = Vec<S>::kLanes, NR = W * kStrips;
  // Eight sums or so hide the latency of the FMA units: small tiles make several over k.
  constexpr int kSums = MR * NR <= 2 ? 4 : MR * NR <= 6 ? 2 : 1;
  Type acc[kSums][MR][NR];
  const S* row[MR];
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
    for (int v = 0; v < NR; ++v) bv[v] = load(b + v / W * pitch + v % W * L).v;
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      const Type am = Vec<S>(row[m][k]).v;
#pragma GCC unroll 12
      for (int v = 0; v < NR; ++v) {
        if constexpr (kStrips == 1) multiply_add<S>(sum[m][v], am, bv[v]);
        else sum[m][v] += am * bv[v];  // more vectors than registers: operands in memory
      }
    }
    b += W * L;
  };
  constexpr int kSteps = kSums > 1 ? kSums : 2;  // two at least: where two threads share a core, decoding is the limit
  int64_t k = 0;
  for (; k + kSteps <= K; k += kSteps) {
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) step(k + i, acc[i % kSums]);
  }
  for (; k < K; ++k) step(k, acc[0]);
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
// other: a: [blocks][K][MR]; b: [K][kTileWidth] of vectors; out: [blocks * MR][n], where n may end inside a vector.
template <class S, int MR, int NR>
void outer_tiles(int64_t blocks, const S* a, const S* b, int64_t K, S* out, int64_t ldo, int64_t n) {
  using Type = typename Raw<S>::Type;
  constexpr int L = Vec<S>::kLanes;
  for (int64_t i = 0; i < blocks; ++i, out += MR * ldo) {
    Type acc[MR][NR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      prefetch_to_write(out + m * ldo, NR * L);
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v) acc[m][v] = Type{};
    }
    const S* row = b;
#pragma GCC unroll 2
    for (int64_t k = 0; k < K; ++k, a += MR, row += kTileWidth * L) {
      Type bv[NR];
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v) bv[v] = load(row + v * L).v;
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Type am = Vec<S>(a[m]).v;
#pragma GCC unroll 4
        for (int v = 0; v < NR; ++v) multiply_add<S>(acc[m][v], am, bv[v]);
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

// to: [K][MR], the first MR columns of a, together. (A copy of mr columns would become a call of memcpy a row.)
template <class S, int MR>
void copy_columns(const S* a, int64_t lda, int64_t K, S* to) {
  for (int64_t k = 0; k < K; ++k, a += lda, to += MR) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) to[m] = a[m];
  }
}

// The tile functions, by their sizes.
template <class S>
struct Tiles {
  using RowTile = void (*)(const S* const*, int64_t, const S*, int64_t, Vec<S>*, int, bool);
  using OuterTiles = void (*)(int64_t, const S*, const S*, int64_t, S*, int64_t, int64_t);
  using Copy = void (*)(const S*, int64_t, int64_t, S*);
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
    static constexpr RowTile table[] = {row_tile<S, M + 1, W, kStrips>...};
    return table[mr - 1];
  }
  template <int NR, int... M>
  static OuterTiles outer_tiles_of(int mr, std::integer_sequence<int, M...>) {
    static constexpr OuterTiles table[] = {outer_tiles<S, M + 1, NR>...};
    return table[mr - 1];
  }
  template <int... M>
  static Copy copy_of(int mr, std::integer_sequence<int, M...>) {
    static constexpr Copy table[] = {copy_columns<S, M + 1>...};
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

// The inner dimension of a product, in at most two runs of the left operand's columns.
struct Inner {
  int64_t first;       // columns [0, first)
  int64_t second = 0;  // then columns [second_at, second_at + second)
  int64_t second_at = 0;
  FUSEDRNN_INLINE int64_t size() const { return first + second; }
};

constexpr auto nothing_expected = [](int64_t, int64_t, int64_t) {};
constexpr auto nothing_more = [](int64_t, int64_t, const auto*, int) {};

// out[u] = sum_k a[k] * w[u * K + k] for L rows of w, of which `rows` exist: a product without packed weights.
template <class S, class T>
Vec<S> dot_rows(const S* a, int64_t K, const T* w, int64_t rows) {
  constexpr int L = Vec<S>::kLanes, kSums = L < 8 ? 8 / L : 1;  // eight sums or more, as in row_tile
  const T* row[L];
  for (int u = 0; u < L; ++u) row[u] = w + (u < rows ? u : rows - 1) * K;
  typename Raw<S>::Type sum[kSums][L] = {};
  int64_t k = 0;
  for (; k + kSums * L <= K; k += kSums * L) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const Vec<S> x = load(a + k + i * L);
#pragma GCC unroll 16
      for (int u = 0; u < L; ++u) sum[i][u] += x.v * load(row[u] + k + i * L).v;
    }
  }
  for (; k < K; k += L) {  // lanes past the end are zero in both
    const Vec<S> x = load<S>(a + k, K - k);
    for (int u = 0; u < L; ++u) sum[0][u] += x.v * load<S>(row[u] + k, K - k).v;
  }
  Vec<S> total[L];
#pragma GCC unroll 16
  for (int u = 0; u < L; ++u) {
    total[u].v = sum[0][u];
#pragma GCC unroll 4
    for (int i = 1; i < kSums; ++i) total[u].v += sum[i][u];
  }
  return sums_of_lanes(total);
}

// The right operand of a product: packed panels, or, for a few rows that are not worth the packing, W itself.
template <class S, class T>
struct Weights {
  const S* panels;
  const T* rows;  // [kGroup * units][K], null if packed
  int64_t units;
};

// Rows times weights: for each own vector v and each row r, epilogue(r, v, acc, stride): gate g of the product is
// acc[g * stride]. A block of rows meets one strip after another, a few rows one panel after another; then, while the
// product is in the first-level cache, comes the epilogue, for the whole block. What it leaves in acc is there for
// second(r, v, acc, stride), which follows for the whole block again.
//   a(r): pointer to row r of the left operand
//   expect(r, u, n): prefetches what the epilogue will touch of row r, elements [u, u + n); called before the product
template <int kGroup, class S, class T, class RowPointer, class Expect, class Epilogue, class Second>
FUSEDRNN_INLINE void product(const Weights<S, T>& weights, Inner inner, Range vectors, Range rows, const RowPointer& a,
                             const Expect& expect, const Epilogue& epilogue, const Second& second) {
  constexpr int U = kGroupVectors<kGroup>, L = Vec<S>::kLanes;
  constexpr int64_t kBlockRows = (12 << 10) / (kPanelWidth * FUSEDRNN_VECTOR_BYTES);
  static_assert(kGroup * U <= kPanelWidth, "a cell with more gates needs a wider panel");
  Vec<S> out[kBlockRows * kPanelWidth];
  const S* row[2][kBlockRows];
  const int64_t K = inner.size(), blocks = ceil_div(rows.size(), kBlockRows);
  const int64_t panels = max64(1, 16 / max64(1, rows.size()));  // that share a block
  for (int64_t first = vectors.begin; first < vectors.end; first += panels * U) {
    const int64_t last = min64(vectors.end, first + panels * U);
    for (int64_t i = 0; i < blocks; ++i) {
      const Range block = part(rows.size(), i, blocks);
      const int64_t r0 = rows.begin + block.begin, n = block.size();
      for (int64_t r = 0; r < n; ++r) {
        row[0][r] = a(r0 + r);
        row[1][r] = row[0][r] + inner.second_at;
        expect(r0 + r, first * L, (last - first) * L);
      }
      Vec<S>* results = out;
      for (int64_t v0 = first; v0 < last; v0 += U) {
        const int nv = static_cast<int>(min64(U, last - v0)), width = kGroup * nv;
        const S* panel = weights.rows ? nullptr : weights.panels + v0 * K * kGroup * L;
        for (int w = 0; w < width && weights.rows; ++w) {
          const int64_t u = (v0 + w % nv) * L;
          const T* own = weights.rows + (w / nv * weights.units + u) * K;
          for (int64_t r = 0; r < n; ++r) results[r * width + w] = dot_rows(row[0][r], K, own, weights.units - u);
        }
        const int64_t whole = strip_width(width), pitch = whole * K * L;
        for (int64_t w = 0, nr = 0; w < width && !weights.rows; w += nr) {
          const int64_t left = width - w, own = min64(left, whole);
          const int64_t strips = n > kFewRows ? 1 : max64(1, min64(left, kFewSums / n) / whole);
          nr = strips * own;
          const S* strip = panel + w * K * L;
          const S* rest = strip + inner.first * own * L;  // of each strip
          for_row_blocks({0, n}, max_rows(static_cast<int>(own)), [&](int64_t r, int mr) {
            const auto tile = Tiles<S>::row_tile_of(static_cast<int>(strips), static_cast<int>(own), mr);
            Vec<S>* to = results + r * width + w;
            tile(row[0] + r, inner.first, strip, pitch, to, width, false);
            if (inner.second) tile(row[1] + r, inner.second, rest, pitch, to, width, true);
          });
        }
        results += n * width;
      }
      const Timed timed(Phase::kCell);
      const auto each = [&](const auto& body) FUSEDRNN_INLINE_LAMBDA {
        Vec<S>* acc = out;
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

template <int kGroup, class S, class T, class RowPointer, class Expect, class Epilogue>
FUSEDRNN_INLINE void product(const Weights<S, T>& weights, Inner inner, Range vectors, Range rows, const RowPointer& a,
                             const Expect& expect, const Epilogue& epilogue) {
  product<kGroup>(weights, inner, vectors, rows, a, expect, epilogue, nothing_more);
}

// Element of vector w of a panel of `width` vectors, at inner index k.
template <class S>
FUSEDRNN_INLINE S* panel_at(S* panel, int64_t K, int width, int w, int64_t k) {
  const int64_t strip_of = strip_width(width), strip = w / strip_of * strip_of;
  return panel + (strip * K + k * min64(strip_of, width - strip) + (w - strip)) * Vec<S>::kLanes;
}

// Panels of output units `vectors`, from W [kGroup * units, K] whose rows are the outputs:
//   vector (g, v), lane u, inner index k  =  w[(g * units + v * lanes + u) * K + k]
template <int kGroup, class S, class T>
void pack_rows(const T* w, int64_t units, int64_t K, Range vectors, S* panels) {
  constexpr int L = Vec<S>::kLanes, U = kGroupVectors<kGroup>;
  for (int64_t v0 = vectors.begin; v0 < vectors.end; v0 += U) {
    const int nv = static_cast<int>(min64(U, vectors.end - v0));
    S* panel = panels + v0 * K * kGroup * L;
    for (int i = 0; i < kGroup * nv; ++i) {
      S* to = panel_at(panel, K, kGroup * nv, i, 0);
      const int64_t pitch = panel_at(panel, K, kGroup * nv, i, 1) - to, u0 = (v0 + i % nv) * L;
      const T* row = w + (i / nv * units + u0) * K;
      for (int64_t k = 0; k < K; k += L) {
        Vec<S> square[L];
#pragma GCC unroll 16
        for (int u = 0; u < L; ++u) square[u] = u0 + u < units ? load<S>(row + u * K + k, K - k) : Vec<S>(0);
        transpose(square);
        for (int j = 0; j < L && k + j < K; ++j) store(to + (k + j) * pitch, square[j]);
      }
    }
  }
}

// Panels of output columns `vectors`, from W [K, columns] whose rows are the inner dimension:
//   vector v, lane u, inner index k  =  w[k * columns + v * lanes + u]
template <class S, class T>
void pack_columns(const T* w, int64_t K, int64_t columns, Range vectors, S* panels) {
  constexpr int L = Vec<S>::kLanes, U = kGroupVectors<1>;
  constexpr int64_t kRows = 16;  // read from end to end before the next: column by column would touch a page a row
  for (int64_t k0 = 0; k0 < K; k0 += kRows) {
    for (int64_t v0 = vectors.begin; v0 < vectors.end; v0 += U) {
      const int nv = static_cast<int>(min64(U, vectors.end - v0));
      S* panel = panels + v0 * K * L;
      for (int64_t k = k0; k < min64(K, k0 + kRows); ++k) {
        for (int v = 0; v < nv; ++v) {
          const int64_t u = (v0 + v) * L;
          store(panel_at(panel, K, nv, v, k), load<S>(w + k * columns + u, columns - u));
        }
      }
    }
  }
}
