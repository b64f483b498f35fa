// AVX2: maddubs multiplies stored weights (u8, 0..2) by codes (s8) and adds neighbours into int16.
//
// A block adds two such products to each int16: at most 2 · (2·2·127) = 1016, so 32 blocks stay below 2^15 and the sums
// are widened to int32 then. Layout of a block: isa_vnni.h.
constexpr int WIDE_TILES = 8, WIDE_FROM = 48, ONE_TILES = 2, MANY_TILES = 1, MANY_TOKENS = 4;
constexpr int64_t WIDEN = 32;

struct Sum { __m256i low16, high16, low, high; };  // outputs 0-7 and 8-15
using Slim = Sum;
struct Digits { __m256i field[4]; };

static inline void clear(Sum& sum) {
  const __m256i none = _mm256_setzero_si256();
  sum = {none, none, none, none};
}

static inline Digits unpack(const uint8_t* from) {
  const __m256i packed = _mm256_loadu_si256((const __m256i*)from), low = _mm256_set1_epi8(3);
  return {{_mm256_and_si256(packed, low), _mm256_and_si256(_mm256_srli_epi16(packed, 2), low),
           _mm256_and_si256(_mm256_srli_epi16(packed, 4), low), _mm256_and_si256(_mm256_srli_epi16(packed, 6), low)}};
}

static inline void add(Sum& sum, const Digits& digits, const int8_t* q) {
  int32_t quad[2];
  std::memcpy(quad, q, 8);
  const __m256i even = _mm256_set1_epi32(quad[0]), odd = _mm256_set1_epi32(quad[1]);
  const __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(digits.field[0], even),
                                       _mm256_maddubs_epi16(digits.field[1], odd));
  const __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(digits.field[2], even),
                                        _mm256_maddubs_epi16(digits.field[3], odd));
  sum.low16 = _mm256_add_epi16(sum.low16, low);
  sum.high16 = _mm256_add_epi16(sum.high16, high);
}

static inline void widen(Sum& sum) {
  const __m256i one = _mm256_set1_epi16(1);
  sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(sum.low16, one));
  sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(sum.high16, one));
  sum.low16 = sum.high16 = _mm256_setzero_si256();
}

static inline void value(const Sum& sum, int32_t codes, float scale, float* y, bool further) {
  const __m256i less = _mm256_set1_epi32(codes);
  const __m256 by = _mm256_set1_ps(scale);
  __m256 low = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum.low, less)), by);
  __m256 high = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum.high, less)), by);
  if (further) low = _mm256_add_ps(_mm256_loadu_ps(y), low), high = _mm256_add_ps(_mm256_loadu_ps(y + 8), high);
  _mm256_storeu_ps(y, low);
  _mm256_storeu_ps(y + 8, high);
}

// Integer codes (integer_loops.h).
constexpr int INTEGER_TOKENS = 2, INT8_TOKENS = 2;
constexpr int32_t EXCESS = 0;  // of a code as dot4 takes it

struct Floats { __m256 low, high; };  // outputs 0-7 and 8-15
struct Words { __m256i low, high; };

static inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Words none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline Words load(const int32_t* from) {
  return {_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 8))};
}
static inline void store(float* to, Floats from) { _mm256_storeu_ps(to, from.low), _mm256_storeu_ps(to + 8, from.high); }
static inline void store(int32_t* to, Words from) {
  _mm256_storeu_si256((__m256i*)to, from.low), _mm256_storeu_si256((__m256i*)(to + 8), from.high);
}

template <int BITS>
struct Decoder {
  static __m256 half(__m256i words, int field) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 32 - BITS * (field + 1)), 32 - BITS));
  }
  Floats operator()(Words words, int field) const { return {half(words.low, field), half(words.high, field)}; }
};

static inline Floats multiply_add(Floats a, float b, Floats sum) {
  const __m256 by = _mm256_set1_ps(b);
  return {_mm256_fmadd_ps(a.low, by, sum.low), _mm256_fmadd_ps(a.high, by, sum.high)};
}
static inline Floats scaled(Floats a, Floats b, Floats sum) {
  return {_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
}
static inline Floats added(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
static inline Words added(Words a, Words b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
static inline Floats widened(const uint16_t* from) {
  const auto half = [](const uint16_t* eight) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)eight)), 16));
  };
  return {half(from), half(from + 8)};
}

// Multiplies |w| (u8) with the code times w's sign: at most 2·127·127 = 32258 in an int16.
static inline Words dot4(Words sum, Words words, int32_t quad) {
  const __m256i codes = _mm256_set1_epi32(quad), one = _mm256_set1_epi16(1);
  const auto half = [&](__m256i w) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(codes, w)), one);
  };
  return {_mm256_add_epi32(sum.low, half(words.low)), _mm256_add_epi32(sum.high, half(words.high))};
}
