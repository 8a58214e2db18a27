// Register tiles of the matrix products, and the packed panels they read. Included after vec.h.
//
// A panel holds nv vectors of output units for kGroup gates over the whole inner dimension K:
//   [K][kGroup][nv][lanes], nv <= kGroupVectors<kGroup>, so a tile is at most four vectors wide.
// A panel that begins at vector v0 begins at element v0 * K * kGroup * lanes: panels of any widths follow
// one another without a table. Lanes past the last unit are zero.

constexpr int kTileWidth = 4;  // vectors
constexpr int kTileRows = 8;   // at most

template <int kGroup>
constexpr int kGroupVectors = kGroup >= kTileWidth ? 1 : kTileWidth / kGroup;

// Rows of a tile of nr vectors: accumulators, one broadcast and the row of the panel fill the register file.
constexpr int max_rows(int nr) {
#if FUSEDRNN_VECTOR_BYTES == 64  // 32 registers
  return nr == 4 ? 6 : 8;
#else  // 16 registers
  return nr == 4 ? 3 : nr == 3 ? 4 : 6;
#endif
}

struct Range {
  int64_t begin, end;
  FUSEDRNN_INLINE int64_t size() const { return end - begin; }
};

// Part i of n equal parts of [0, total).
FUSEDRNN_INLINE Range part(int64_t total, int64_t i, int64_t n) { return {total * i / n, total * (i + 1) / n}; }

FUSEDRNN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FUSEDRNN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDRNN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// out[m][v] (+)= sum_k a[m][k] * b[k][v].      b: [K][NR] vectors
template <class S, int MR, int NR>
void row_tile(const S* const* a, int64_t K, const S* b, Vec<S>* out, bool accumulate) {
  using Type = typename Raw<S>::Type;
  constexpr int L = Vec<S>::kLanes;
  // A single row has too few accumulators to hide the latency of the FMA units: two sums, of even and odd k.
  constexpr int kSums = MR * NR <= 4 ? 2 : 1;
  Type acc[kSums][MR][NR];
  const S* row[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    row[m] = a[m];
#pragma GCC unroll 4
    for (int v = 0; v < NR; ++v) {
      acc[0][m][v] = accumulate ? out[m * NR + v].v : Type{};
      if constexpr (kSums == 2) acc[1][m][v] = Type{};
    }
  }
  const auto step = [&](int64_t k, Type(&sum)[MR][NR]) __attribute__((always_inline)) {
    Type bv[NR];
#pragma GCC unroll 4
    for (int v = 0; v < NR; ++v) bv[v] = load(b + v * L).v;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Type am = Vec<S>(row[m][k]).v;
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v) sum[m][v] += am * bv[v];
    }
    b += NR * L;
  };
  int64_t k = 0;
  if constexpr (kSums == 2) {
    for (; k + 2 <= K; k += 2) step(k, acc[0]), step(k + 1, acc[1]);
  }
  for (; k < K; ++k) step(k, acc[0]);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < NR; ++v) {
      if constexpr (kSums == 2) acc[0][m][v] += acc[1][m][v];
      out[m * NR + v].v = acc[0][m][v];
    }
  }
}

// out[m][v] = sum_k a[k][m] * b[k][v], for weight gradients: k runs over rows.
template <class S, int MR, int NR>
void outer_tile(const S* a, int64_t lda, const S* b, int64_t ldb, int64_t K, Vec<S>* out) {
  using Type = typename Raw<S>::Type;
  constexpr int L = Vec<S>::kLanes;
  Type acc[MR][NR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < NR; ++v) acc[m][v] = Type{};
  }
  for (int64_t k = 0; k < K; ++k, a += lda, b += ldb) {
    Type bv[NR];
#pragma GCC unroll 4
    for (int v = 0; v < NR; ++v) bv[v] = load(b + v * L).v;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Type am = Vec<S>(a[m]).v;
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v) acc[m][v] += am * bv[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < NR; ++v) out[m * NR + v].v = acc[m][v];
  }
}

// The tile functions for every size, [nr - 1][mr - 1].
template <class S>
struct Tiles {
  using RowTile = void (*)(const S* const*, int64_t, const S*, Vec<S>*, bool);
  using OuterTile = void (*)(const S*, int64_t, const S*, int64_t, int64_t, Vec<S>*);

  template <int MR, int NR>
  static constexpr RowTile row() {
    if constexpr (MR <= max_rows(NR)) return row_tile<S, MR, NR>;
    return nullptr;
  }
  template <int MR, int NR>
  static constexpr OuterTile outer() {
    if constexpr (MR <= max_rows(NR)) return outer_tile<S, MR, NR>;
    return nullptr;
  }
#define FUSEDRNN_TILES(KIND, NR)                                                                    \
  {KIND<1, NR>(), KIND<2, NR>(), KIND<3, NR>(), KIND<4, NR>(), KIND<5, NR>(), KIND<6, NR>(), KIND<7, NR>(), \
   KIND<8, NR>()}
  static RowTile row_tile_of(int nr, int mr) {
    static constexpr RowTile table[kTileWidth][kTileRows] = {FUSEDRNN_TILES(row, 1), FUSEDRNN_TILES(row, 2),
                                                             FUSEDRNN_TILES(row, 3), FUSEDRNN_TILES(row, 4)};
    return table[nr - 1][mr - 1];
  }
  static OuterTile outer_tile_of(int nr, int mr) {
    static constexpr OuterTile table[kTileWidth][kTileRows] = {FUSEDRNN_TILES(outer, 1), FUSEDRNN_TILES(outer, 2),
                                                               FUSEDRNN_TILES(outer, 3), FUSEDRNN_TILES(outer, 4)};
    return table[nr - 1][mr - 1];
  }
#undef FUSEDRNN_TILES
};

// body(first row, rows) over blocks of nearly equal size, none above max_rows(nr).
template <class Body>
FUSEDRNN_INLINE void for_row_blocks(Range rows, int nr, const Body& body) {
  const int64_t blocks = ceil_div(rows.size(), max_rows(nr));
  for (int64_t i = 0; i < blocks; ++i) {
    const Range r = part(rows.size(), i, blocks);
    body(rows.begin + r.begin, static_cast<int>(r.size()));
  }
}

// The inner dimension of a product, in at most two runs of the left operand's columns.
struct Inner {
  int64_t first;            // columns [0, first)
  int64_t second = 0;       // then columns [second_at, second_at + second)
  int64_t second_at = 0;
  FUSEDRNN_INLINE int64_t size() const { return first + second; }
};

// Rows times panels: for each own vector v and each row r, epilogue(r, v, acc, stride): gate g of the product is
// acc[g * stride]. The tile never leaves the first-level cache between product and epilogue.
//   a(r): pointer to row r of the left operand      panels: packed from vector 0 on
template <int kGroup, class S, class RowPointer, class Epilogue>
FUSEDRNN_INLINE void product(const S* panels, Inner inner, Range vectors, Range rows, const RowPointer& a,
                             const Epilogue& epilogue) {
  constexpr int U = kGroupVectors<kGroup>, L = Vec<S>::kLanes;
  Vec<S> out[kTileRows * kTileWidth];
  for (int64_t v0 = vectors.begin; v0 < vectors.end; v0 += U) {
    const int nv = static_cast<int>(min64(U, vectors.end - v0)), nr = kGroup * nv;
    const S* panel = panels + v0 * inner.size() * kGroup * L;
    for_row_blocks(rows, nr, [&](int64_t r, int mr) {
      const S* row[kTileRows];
      for (int m = 0; m < mr; ++m) row[m] = a(r + m);
      const auto tile = Tiles<S>::row_tile_of(nr, mr);
      tile(row, inner.first, panel, out, false);
      if (inner.second) {
        for (int m = 0; m < mr; ++m) row[m] += inner.second_at;
        tile(row, inner.second, panel + inner.first * nr * L, out, true);
      }
      for (int m = 0; m < mr; ++m) {
        for (int v = 0; v < nv; ++v) epilogue(r + m, v0 + v, out + m * nr + v, nv);
      }
    });
  }
}

// Weight gradients: out[m][n] (+)= sum_k a[k][m] * b[k][n] for m in [0, M), n in [0, N).
// b's rows are readable to a multiple of kTileWidth vectors. Blocks of k keep b's panel in the first-level cache.
template <class S>
void outer_product(const S* a, int64_t lda, const S* b, int64_t ldb, int64_t K, int64_t M, int64_t N, S* out,
                   int64_t ldo, bool accumulate) {
  constexpr int L = Vec<S>::kLanes;
  constexpr int64_t kBlock = 512 / sizeof(S);
  Vec<S> tile[kTileRows * kTileWidth];
  for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
    const int64_t kn = min64(kBlock, K - k0);
    const bool add = accumulate || k0 > 0;
    for (int64_t n0 = 0; n0 < N; n0 += kTileWidth * L) {
      const int64_t n_end = min64(N, n0 + kTileWidth * L);
      const int nr = static_cast<int>(ceil_div(n_end - n0, L));
      for_row_blocks({0, M}, nr, [&](int64_t m0, int mr) {
        Tiles<S>::outer_tile_of(nr, mr)(a + k0 * lda + m0, lda, b + k0 * ldb + n0, ldb, kn, tile);
        for (int m = 0; m < mr; ++m) {
          for (int v = 0; v < nr; ++v) {
            S* p = out + (m0 + m) * ldo + n0 + v * L;
            const int64_t n = n_end - n0 - v * L;
            const Vec<S> t = tile[m * nr + v];
            store(p, add ? load<S>(p, n) + t : t, n);
          }
        }
      });
    }
  }
}

// Panels of output units, from W [kGroup * units, ldw] whose rows are the outputs:
//   panel[k][g][u] = w[(g * units + u) * ldw + k]
template <int kGroup, class S, class T>
void pack_rows(const T* w, int64_t units, int64_t K, int64_t ldw, int64_t v0, int nv, S* panels) {
  constexpr int L = Vec<S>::kLanes;
  S* panel = panels + v0 * K * kGroup * L;
  const int64_t width = static_cast<int64_t>(nv) * L, u0 = v0 * L, n = min64(width, units - u0);
  constexpr int64_t kBlock = 16;  // columns read from each row before the next: one cache line of float
  for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
    const int64_t k1 = min64(K, k0 + kBlock);
    for (int g = 0; g < kGroup; ++g) {
      for (int64_t u = 0; u < n; ++u) {
        const T* row = w + (g * units + u0 + u) * ldw;
        for (int64_t k = k0; k < k1; ++k) panel[(k * kGroup + g) * width + u] = to_compute(row[k]);
      }
      for (int64_t k = k0; k < k1; ++k) {
        for (int64_t u = n; u < width; ++u) panel[(k * kGroup + g) * width + u] = S(0);
      }
    }
  }
}

// Panels of output columns, from W [K, ldw] whose rows are the inner dimension: panel[k][u] = w[k * ldw + u].
template <class S, class T>
void pack_columns(const T* w, int64_t K, int64_t columns, int64_t ldw, int64_t v0, int nv, S* panels) {
  constexpr int L = Vec<S>::kLanes;
  S* panel = panels + v0 * K * L;
  const int64_t u0 = v0 * L;
  for (int64_t k = 0; k < K; ++k) {
    for (int v = 0; v < nv; ++v) {
      const int64_t u = u0 + v * L;
      store(panel + (k * nv + v) * L, load<S>(w + k * ldw + u, columns - u));
    }
  }
}
