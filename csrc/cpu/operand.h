// What the matrix products read. Included after vec.h.
//
// The operands of a product are of type E: the type that is computed in, or bfloat16. Then two neighbours along the
// inner dimension are one word of 32 bits, and a multiply-add of words adds both products, exact in float32, to a sum
// in float32: half the bytes and half the instructions. A step is a word of the inner dimension; there are whole blocks
// of them, with zeros at the end.

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
template <class E>
constexpr int kPair = Operand<E>::kPair;  // elements of a word
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

template <class E>
FUSEDRNN_INLINE WordsOf<E> load_words(const E* p) {
  return *reinterpret_cast<const typename Raw<typename Operand<E>::Sum>::Unaligned*>(p);
}
template <class E>
FUSEDRNN_INLINE void store_words(E* p, WordsOf<E> words) {
  *reinterpret_cast<typename Raw<typename Operand<E>::Sum>::Unaligned*>(p) = words;
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
    T words[kMost] = {};
    for (int64_t i = 0; i < n; ++i) words[i] = p[i];
    return load_words(words);
  }
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

// sum += a * b.
template <class E>
FUSEDRNN_INLINE void add_product(WordsOf<E>& sum, WordsOf<E> a, WordsOf<E> b) {
  if constexpr (kPair<E> == 1) {
    sum += a * b;
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
