// Matrix products by AMX: tiles of 16 rows of 64 bytes. Included after operand.h, where the processor has them. A tile
// of bfloat16 holds 16 rows of 16 words; a product of two adds 16 x 16 sums of 16 words each to a tile of float32.

constexpr int64_t kTileBytes = 64;  // of a row

#if !defined(FUSEDRNN_AVX2_AS_AVX512)

// The tiles of the calling thread, while it lives. (Released at the end: others may want them of another form.)
class TileUse {
 public:
  TileUse() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } form;
    for (int i = 0; i < 8; ++i) form.bytes[i] = kTileBytes, form.rows[i] = kTileRows;
    asm volatile("ldtilecfg %0" ::"m"(form));
  }
  TileUse(const TileUse&) = delete;
  ~TileUse() { asm volatile("tilerelease"); }
};

// Tile i, from rows `stride` bytes apart, and to them.
template <int i>
FUSEDRNN_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(i) : "memory");
}
template <int i>
FUSEDRNN_INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(i) : "memory");
}
template <int i>
FUSEDRNN_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(i));
}
template <int sum, int a, int b>
FUSEDRNN_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

#else  // the same with memory for registers, and the processor's order of sums: `make test-avx512`

struct TileUse {};
thread_local Words tile[8][kTileRows];

template <int i>
void load_tile(const void* p, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r)
    __builtin_memcpy(&tile[i][r], static_cast<const char*>(p) + r * stride, kTileBytes);
}
template <int i>
void store_tile(void* p, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r) __builtin_memcpy(static_cast<char*>(p) + r * stride, &tile[i][r], kTileBytes);
}
template <int i>
void clear_tile() {
  for (Words& row : tile[i]) row = Words{};
}
template <int sum, int a, int b>
void multiply_tiles() {
  using Floats = Raw<float>::Type;
  const Words second = Words{} + 0xffff0000u;
  for (int m = 0; m < kTileRows; ++m) {
    Floats even = {}, odd = {};
    for (int k = 0; k < kTileRows; ++k) {
      const Words left = Words{} + tile[a][m][k], right = tile[b][k];
      even += (Floats)(left << 16) * (Floats)(right << 16);
      odd += (Floats)(left & second) * (Floats)(right & second);
    }
    tile[sum][m] = (Words)((Floats)tile[sum][m] + (even + odd));
  }
}

#endif

template <class Body, int... I>
FUSEDRNN_INLINE void for_each_index(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>()), ...);
}
template <int n, class Body>
FUSEDRNN_INLINE void for_each_index(const Body& body) {
  for_each_index(body, std::make_integer_sequence<int, n>());
}

// Rows in memory: where the first begins, and bytes from one to the next.
template <class P>
struct TileRows {
  P* data;
  int64_t stride;
  FUSEDRNN_INLINE TileRows at(int64_t row, int64_t byte) const { return {data + row * stride + byte, stride}; }
};
using TileSource = TileRows<const char>;
using TileSums = TileRows<char>;

// MB x NV tiles of sums, added to what they hold or to zero: out (+)= a b over `blocks` of 16 words. a: rows of the
// left operand; b: rows of words, as panels and Strips hold them.
template <int MB, int NV>
void tile_product(TileSource a, TileSource b, int64_t blocks, TileSums out, bool accumulate) {
  constexpr int kLeft = MB * NV, kRight = kLeft + MB;  // the operands' tiles; of the right one as many as are left
  static_assert(kRight < 8);
  const auto sums = [&](const auto& body) {
    for_each_index<MB>([&](auto m) {
      for_each_index<NV>(
          [&](auto v) { body(std::integral_constant<int, m * NV + v>(), out.at(m * kTileRows, v * kTileBytes).data); });
    });
  };
  sums([&](auto i, char* p) {
    if (accumulate) load_tile<i>(p, out.stride);
    else clear_tile<i>();
  });
  for (int64_t k = 0; k < blocks; ++k, a = a.at(0, kTileBytes), b = b.at(kTileRows, 0)) {
    for_each_index<MB>([&](auto m) { load_tile<kLeft + m>(a.at(m * kTileRows, 0).data, a.stride); });
    for_each_index<NV>([&](auto v) {
      constexpr int r = kRight + v % (8 - kRight);
      load_tile<r>(b.at(0, v * kTileBytes).data, b.stride);
      for_each_index<MB>([&](auto m) { multiply_tiles<m * NV + v, kLeft + m, r>(); });
    });
  }
  sums([&](auto i, char* p) { store_tile<i>(p, out.stride); });
}

// The same for any number of rows and vectors.
FUSEDRNN_INLINE void tile_products(int64_t rows, int64_t vectors, TileSource a, TileSource b, int64_t blocks,
                                   TileSums out, bool accumulate) {
  for (int64_t r = 0; r < rows; r += 2 * kTileRows) {
    const bool two = rows - r > kTileRows;
    for (int64_t v = 0, n; v < vectors; v += n) {
      n = vectors - v;
      const auto run = [&](auto product) {
        product(a.at(r, 0), b.at(0, v * kTileBytes), blocks, out.at(r, v * kTileBytes), accumulate);
      };
      if (two && n > 1) n = 2, run(tile_product<2, 2>);
      else if (two) n = 1, run(tile_product<2, 1>);
      else if (n > 3) n = 4, run(tile_product<1, 4>);
      else if (n == 3) run(tile_product<1, 3>);
      else if (n == 2) run(tile_product<1, 2>);
      else run(tile_product<1, 1>);
    }
  }
}

// Rows of memory that others see as elements.
template <class T>
FUSEDRNN_INLINE TileSource tile_source(const T* data, int64_t stride) {
  return {reinterpret_cast<const char*>(data), stride};
}
template <class T>
FUSEDRNN_INLINE TileSums tile_sums(T* data, int64_t stride) {
  return {reinterpret_cast<char*>(data), stride};
}
