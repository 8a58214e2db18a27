// Products of the weight gradients: sums over rows, of the tiles of gemm.h. Included after it.

// Right operand of a weight gradient: rows of n columns, kept as strips [steps][kTileWidth][lanes] of words. A word of
// two elements holds a column of two rows.
template <class E>
struct Strips {
  E* data;
  int64_t n, most_rows;  // whole words
  static constexpr int64_t kColumns = kTileWidth * Sums<E>::kLanes;
  static int64_t elements(int64_t n, int64_t most_rows) { return ceil_div(n, kColumns) * kColumns * most_rows; }
  // Where the words of columns [i, i + lanes) of a row are; i a multiple of lanes.
  FUSEDRNN_INLINE E* at(int64_t row, int64_t i) const {
    const int64_t strip = i / kColumns, first = row / kPair<E> * kPair<E>;
    return data + (strip * most_rows + first) * kColumns + (i - strip * kColumns) * kPair<E>;
  }
  // Columns [i, i + lanes) of a row; the first row of a word clears those after it.
  FUSEDRNN_INLINE void put(int64_t row, int64_t i, Sums<E> v) const {
    if constexpr (kPair<E> == 1) {
      store(at(row, i), v);
    } else {
      const Words bits = rounded_to_bfloat16(v), words = row % 2 ? (Words)load_words(at(row, i)) | bits << 16 : bits;
      store_words(at(row, i), (WordsOf<E>)words);
    }
  }
};

// out[m * ldo + n] = sum_k a[k * lda + m] * b(k, n), or += with `add`, for m in [0, M), n in [0, b.n), k in [0, K), K >
// 0. kSumRows rows at a time: their part of `a` is copied into blocks as wide as a tile, which stay in the first-level
// cache and meet one strip of b after another. A sum of sums over kSumRows: the rounding error of one long sum would
// exceed torch.nn's.
template <class E, class S>
void outer_product(const E* a, int64_t lda, int64_t K, int64_t M, const Strips<E>& b, S* out, int64_t ldo, bool add) {
  constexpr int64_t kSumRows = 64, kBytes = 16 << 10, kColumns = Strips<E>::kColumns;
  constexpr int64_t kBlocks = kBytes / (kOuterRows * kSumRows * sizeof(E));
  alignas(64) E copy[kBlocks * kOuterRows * kSumRows];
  for (int64_t k0 = 0; k0 < K; k0 += kSumRows) {
    const int64_t kn = min64(kSumRows, K - k0), steps = steps_of<E>(kn);
    for (int64_t m0 = 0, mn; m0 < M; m0 += mn) {  // whole blocks, then what is left of the columns
      const int mr = static_cast<int>(min64(kOuterRows, M - m0));
      const int64_t blocks = min64(kBlocks, (M - m0) / mr);
      mn = blocks * mr;
      for (int64_t i = 0; i < blocks; ++i) {
        Tiles<E>::copy_of(mr)(a + k0 * lda + m0 + i * mr, lda, kn, copy + i * mr * steps * kPair<E>);
      }
      for (int64_t n0 = 0; n0 < b.n; n0 += kColumns) {
        const int64_t n = min64(kColumns, b.n - n0);
        const int nr = static_cast<int>(ceil_div(n, Sums<E>::kLanes));
        Tiles<E>::outer_tiles_of(nr, mr)(blocks, copy, b.at(k0, n0), steps, out + m0 * ldo + n0, ldo, n, add || k0 > 0);
      }
    }
  }
}

#if defined(FUSEDRNN_AMX)
// The same by tiles: kSumRows rows of 32 columns of `a` become rows of a left operand.
template <class S>
void outer_product(const BFloat16* a, int64_t lda, int64_t K, int64_t M, const Strips<BFloat16>& b, S* out, int64_t ldo,
                   bool add) {
  constexpr int64_t kSumRows = 512, kColumns = 2 * kTileRows, kStride = kSumRows + 32;  // elements
  constexpr int L = Vec<S>::kLanes;
  static_assert(L == kTileRows);
  alignas(64) BFloat16 left[kColumns * kStride];
  alignas(64) S tiles[kColumns * Strips<BFloat16>::kColumns];
  for (int64_t k0 = 0; k0 < K; k0 += kSumRows) {
    const int64_t kn = min64(kSumRows, K - k0), steps = steps_of<BFloat16>(kn);
    const bool more = add || k0 > 0;
    for (int64_t m0 = 0; m0 < M; m0 += kColumns) {
      const int64_t mn = min64(kColumns, M - m0);
      for (int64_t m = 0; m < mn; m += L) {
        for (int64_t s = 0; s < steps; s += L) {
          Vec<S> square[L];
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) {
            const int64_t k = 2 * (s + j);
            square[j].v = rows_as_words<BFloat16>(a + (k0 + k) * lda + m0 + m, lda, kn - k, L);
          }
          transpose(square);
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) store_words(left + (m + j) * kStride + 2 * s, square[j].v);
        }
      }
      for (int64_t n0 = 0; n0 < b.n; n0 += Strips<BFloat16>::kColumns) {
        const int64_t n = min64(Strips<BFloat16>::kColumns, b.n - n0), vectors = ceil_div(n, L);
        const bool whole = mn % kTileRows == 0 && n % L == 0;
        S* const to = out + m0 * ldo + n0;
        const int64_t stride = whole ? ldo : Strips<BFloat16>::kColumns;
        tile_products(mn, vectors, tile_source(left, kStride * 2), tile_source(b.at(k0, n0), kTileWidth * kTileBytes),
                      steps / kTileRows, tile_sums(whole ? to : tiles, stride * static_cast<int64_t>(sizeof(S))),
                      whole && more);
        for (int64_t m = 0; m < mn && !whole; ++m) {
          for (int64_t j = 0; j < n; j += L) {
            S* p = to + m * ldo + j;
            const Vec<S> own = load(tiles + m * stride + j);
            store(p, more ? load<S>(p, n - j) + own : own, n - j);
          }
        }
      }
    }
  }
}
#endif
