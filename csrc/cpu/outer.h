// Products of the weight gradients: sums over rows, of the tiles of gemm.h. Included after it.

// Right operand of a weight gradient: rows of n columns, kept as strips [rows][kTileWidth][lanes].
template <class S>
struct Strips {
  S* data;
  int64_t n, most_rows;
  static constexpr int64_t kColumns = kTileWidth * Vec<S>::kLanes;
  static int64_t elements(int64_t n, int64_t most_rows) { return ceil_div(n, kColumns) * kColumns * most_rows; }
  // Where columns [i, i + lanes) of a row are; i a multiple of lanes.
  FUSEDRNN_INLINE S* at(int64_t row, int64_t i) const {
    const int64_t strip = i / kColumns;
    return data + (strip * most_rows + row) * kColumns + (i - strip * kColumns);
  }
};

// out[m * ldo + n] += sum_k a[k * lda + m] * b(k, n) for m in [0, M), n in [0, b.n), k in [0, K).
// kSumRows rows at a time: their part of `a` is copied into blocks as wide as a tile, which stay in the first-level
// cache and meet one strip of b after another. A sum of sums over kSumRows: the rounding error of one long sum would
// exceed torch.nn's.
template <class S>
void outer_product(const S* a, int64_t lda, int64_t K, int64_t M, const Strips<S>& b, S* out, int64_t ldo) {
  constexpr int64_t kSumRows = 64, kBytes = 16 << 10, kColumns = Strips<S>::kColumns;
  constexpr int64_t kBlocks = kBytes / (kOuterRows * kSumRows * sizeof(S));
  alignas(64) S copy[kBlocks * kOuterRows * kSumRows];
  for (int64_t k0 = 0; k0 < K; k0 += kSumRows) {
    const int64_t kn = min64(kSumRows, K - k0);
    for (int64_t m0 = 0, mn; m0 < M; m0 += mn) {  // whole blocks, then what is left of the columns
      const int mr = static_cast<int>(min64(kOuterRows, M - m0));
      const int64_t blocks = min64(kBlocks, (M - m0) / mr);
      mn = blocks * mr;
      for (int64_t i = 0; i < blocks; ++i) {
        Tiles<S>::copy_of(mr)(a + k0 * lda + m0 + i * mr, lda, kn, copy + i * mr * kn);
      }
      for (int64_t n0 = 0; n0 < b.n; n0 += kColumns) {
        const int64_t n = min64(kColumns, b.n - n0);
        const int nr = static_cast<int>(ceil_div(n, Vec<S>::kLanes));
        Tiles<S>::outer_tiles_of(nr, mr)(blocks, copy, b.at(k0, n0), kn, out + m0 * ldo + n0, ldo, n);
      }
    }
  }
}
