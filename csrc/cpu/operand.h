// What the matrix products read. Included after vec.h.
//
// The operands of a product are of type E: the type that is computed in, bfloat16 or int8. Then two or four neighbours
// along the inner dimension are one word of 32 bits, and a multiply-add of words adds all their products: of bfloat16
// each exact in float32, to a sum in float32; of int8 to a sum in int32, the same on every instruction set. So there
// are fewer bytes and fewer instructions. A step is a word of the inner dimension; there are whole blocks of them, with
// zeros at the end.
//
// int8 operands lie in [-127, 127]. VNNI multiplies unsigned bytes by signed ones: its weights are stored with 128
// added, and each sum starts at -128 times the sum of the left operand's row.

template <class E>
struct Operand {
  using Sum = E;
  static constexpr int kPair = 1;
};
template <>
struct Operand<BFloat16> {
  using Sum = float;
  static constexpr int kPair = 2;
};
template <>
struct Operand<int8_t> {
  using Sum = int32_t;
  static constexpr int kPair = 4;
};
template <class E>
constexpr int kPair = Operand<E>::kPair;  // elements of a word
#if defined(FUSEDRNN_VNNI)
template <class E>
constexpr bool kUnsignedWeights = std::is_same_v<E, int8_t>;
#else
template <class E>
constexpr bool kUnsignedWeights = false;
#endif
template <class E>
using Sums = Vec<typename Operand<E>::Sum>;
template <class E>
using WordsOf = typename Sums<E>::Type;  // a vector of words; of pairs, bits that are no numbers

FUSEDRNN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(FUSEDRNN_AMX)
constexpr int kTileRows = 16;  // and words of a row (amx.h)
template <class E>
constexpr int kStepBlock = kPair<E> == 1 ? 1 : kTileRows;
constexpr int kRowsAhead = kTileRows - 1;  // that a product reads past the last
#else
template <class E>
constexpr int kStepBlock = 1;
constexpr int kRowsAhead = 0;
#endif
template <class E>
FUSEDRNN_INLINE int64_t steps_of(int64_t n) {
  return ceil_div(n, kPair<E> * kStepBlock<E>) * kStepBlock<E>;
}
template <class E>
FUSEDRNN_INLINE int64_t whole_steps(int64_t n) {  // elements
  return steps_of<E>(n) * kPair<E>;
}

// At any element.
template <class E>
FUSEDRNN_INLINE WordsOf<E> load_words(const E* p) {
  WordsOf<E> words;
  __builtin_memcpy(&words, p, sizeof words);
  return words;
}
template <class E>
FUSEDRNN_INLINE void store_words(E* p, WordsOf<E> words) {
  __builtin_memcpy(p, &words, sizeof words);
}

// The word at p in all lanes.
template <class E>
FUSEDRNN_INLINE WordsOf<E> same_words(const E* p) {
  if constexpr (kPair<E> == 1) {
    return Vec<E>(*p).v;
  } else {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return (WordsOf<E>)(Raw<float>::Int{} + word);
  }
}

// A vector of words from elements of another type, too; of the first n alone, the others zero.
template <class E, class T>
FUSEDRNN_INLINE WordsOf<E> words_of(const T* p) {
  if constexpr (kPair<E> == 1) return load(p).v;
  else return load_words(p);
}
template <class E, class T>
FUSEDRNN_INLINE WordsOf<E> words_of(const T* p, int64_t n) {
  if constexpr (kPair<E> == 1) {
    return load<typename Operand<E>::Sum>(p, n).v;
  } else {
    constexpr int kMost = Sums<E>::kLanes * kPair<E>;
    if (__builtin_expect(n >= kMost, 1)) return load_words(p);
#if defined(FUSEDRNN_MASKED_LOADS)
    if (n % kPair<E> == 0) return (WordsOf<E>)load_words_masked(p, n / kPair<E>);
#endif
    T words[kMost] = {};
    for (int64_t i = 0; i < n; ++i) words[i] = p[i];
    return load_words(words);
  }
}

// The same of weights, as products read them.
template <class E, class T>
FUSEDRNN_INLINE WordsOf<E> weight_words_of(const T* p) {
  if constexpr (kUnsignedWeights<E>) return words_of<E>(p) ^ static_cast<int32_t>(0x80808080u);
  else return words_of<E>(p);
}
template <class E, class T>
FUSEDRNN_INLINE WordsOf<E> weight_words_of(const T* p, int64_t n) {
  if constexpr (kUnsignedWeights<E>) return words_of<E>(p, n) ^ static_cast<int32_t>(0x80808080u);
  else return words_of<E>(p, n);
}

// Words of the first n columns of as many rows as a word has elements, of which `rows` are there.
template <class E, class T>
FUSEDRNN_INLINE WordsOf<E> rows_as_words(const T* first, int64_t stride, int64_t rows, int64_t n) {
  if constexpr (kPair<E> == 1) {
    return load<typename Operand<E>::Sum>(first, n).v;
  } else {
    const Sums<E> low = rows > 0 ? load<float>(first, n) : Sums<E>(0);
    const Sums<E> high = rows > 1 ? load<float>(first + stride, n) : Sums<E>(0);
    return (WordsOf<E>)(((Words)low.v >> 16) | (Words)high.v);  // their low halves are zero
  }
}

// sum += the products of four bytes, those of the left operand and of weights.
FUSEDRNN_INLINE void add_products_of_bytes(WordsOf<int8_t>& sum, WordsOf<int8_t> a, WordsOf<int8_t> b) {
#if defined(FUSEDRNN_VNNI) && defined(FUSEDRNN_AVX2_AS_AVX512)  // as the instructions below do
  for (int byte = 0; byte < 4; ++byte) {
    const int up = 24 - 8 * byte;
    sum += ((a << up) >> 24) * (WordsOf<int8_t>)((Words)(b << up) >> 24);
  }
#elif defined(FUSEDRNN_VNNI) && FUSEDRNN_VECTOR_BYTES == 64
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
#elif defined(FUSEDRNN_VNNI) && FUSEDRNN_VECTOR_BYTES == 32
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(b), "x"(a));
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32  // two products of at most 127 * 127: no sum saturates
  typedef int8_t Bytes __attribute__((vector_size(32)));
  typedef int16_t Pairs __attribute__((vector_size(32)));
  const Bytes size = (Bytes)b < 0 ? -(Bytes)b : (Bytes)b;
  Pairs pairs;
  WordsOf<int8_t> signed_a, products;
  asm("vpsignb %2, %1, %0" : "=x"(signed_a) : "x"(a), "x"(b));
  asm("vpmaddubsw %2, %1, %0" : "=x"(pairs) : "x"(size), "x"(signed_a));
  asm("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(pairs), "x"(Pairs{} + int16_t{1}));
  sum += products;
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 16
  typedef int16_t Pairs __attribute__((vector_size(16)));
  Pairs even = ((Pairs)a << 8) >> 8, odd = (Pairs)a >> 8;
  const Pairs even_weights = ((Pairs)b << 8) >> 8, odd_weights = (Pairs)b >> 8;
  asm("pmaddwd %1, %0" : "+x"(even) : "x"(even_weights));
  asm("pmaddwd %1, %0" : "+x"(odd) : "x"(odd_weights));
  sum += (WordsOf<int8_t>)even + (WordsOf<int8_t>)odd;
#else
  for (int byte = 0; byte < 4; ++byte) {
    const int up = 24 - 8 * byte;
    sum += ((a << up) >> 24) * ((b << up) >> 24);
  }
#endif
}

// What the sums of a row of the left operand start at.
template <class E>
FUSEDRNN_INLINE WordsOf<E> start_of_sums(const E* row, int64_t n) {
  WordsOf<E> start{};
  if constexpr (kUnsignedWeights<E>) {
    constexpr int kBytes = Sums<E>::kLanes * kPair<E>;
    WordsOf<E> lanes{};
    const WordsOf<E> same = start + static_cast<int32_t>(0x80808080u);
    for (int64_t k = 0; k < n; k += kBytes) add_products_of_bytes(lanes, words_of<E>(row + k, n - k), same);
    int32_t sum = 0;
    for (int lane = 0; lane < Sums<E>::kLanes; ++lane) sum += lanes[lane];
    start -= sum;
  }
  return start;
}

// sum += a * b; b of the weights, where one operand is of them.
template <class E>
FUSEDRNN_INLINE void add_product(WordsOf<E>& sum, WordsOf<E> a, WordsOf<E> b) {
  if constexpr (kPair<E> == 1) {
    sum += a * b;
  } else if constexpr (kPair<E> == 4) {
    add_products_of_bytes(sum, a, b);
  } else {
#if defined(FUSEDRNN_BF16_PRODUCTS)
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else  // as that instruction does, which adds the second product first
    const Words x = (Words)a, y = (Words)b, second = Words{} + 0xffff0000u;
    sum += (WordsOf<E>)(x & second) * (WordsOf<E>)(y & second);
    sum += (WordsOf<E>)(x << 16) * (WordsOf<E>)(y << 16);
#endif
  }
}

// The same for loops that need all registers: of operands in registers, one instruction. Left to itself g++ takes some
// from memory or saves others there.
template <class E>
FUSEDRNN_INLINE void multiply_add(WordsOf<E>& sum, WordsOf<E> a, WordsOf<E> b) {
#if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32
  if constexpr (sizeof(E) == 4) asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  else if constexpr (sizeof(E) == 8) asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  else add_product<E>(sum, a, b);
#else
  add_product<E>(sum, a, b);
#endif
}
