// AVX-512 with VNNI: dpbusd multiplies the stored weights (u8) by codes (s8) straight into int32, sixteen outputs at once.
//
// A block of 32 bytes, bits 2f and 2f+1 of byte j: field f = 0, 1 holds outputs 0-7 and inputs 0-3, 4-7; fields 2, 3
// the same for outputs 8-15. Output = j / 4, input = j % 4 within a field.
constexpr int WIDE_TILES = 16, WIDE_FROM = 8, ONE_TILES = 4, MANY_TILES = 2, MANY_TOKENS = 8;
constexpr int64_t WIDEN = int64_t(1) << 40;  // never: the sums are int32 from the start

struct Sum { __m512i even, odd; };  // two chains, because dpbusd takes several cycles
struct Slim { __m512i all; };       // one, where many tokens keep it busy
struct Digits { __m512i even, odd; };

static inline void clear(Sum& sum) { sum.even = sum.odd = _mm512_setzero_si512(); }
static inline void clear(Slim& sum) { sum.all = _mm512_setzero_si512(); }

static inline Digits unpack(const uint8_t* from) {
  const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)from));
  const __m512i low = _mm512_set1_epi8(3);
  const __m512i shifts = _mm512_set_epi32(4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i halves = _mm512_srlv_epi32(both, shifts);  // fields 0 and 2 now lie lowest
  return {_mm512_and_si512(halves, low), _mm512_and_si512(_mm512_srli_epi32(halves, 2), low)};
}

static inline void add(Sum& sum, const Digits& digits, const int8_t* q) {
  int32_t quad[2];
  std::memcpy(quad, q, 8);
  sum.even = _mm512_dpbusd_epi32(sum.even, digits.even, _mm512_set1_epi32(quad[0]));
  sum.odd = _mm512_dpbusd_epi32(sum.odd, digits.odd, _mm512_set1_epi32(quad[1]));
}
static inline void add(Slim& sum, const Digits& digits, const int8_t* q) {
  int32_t quad[2];
  std::memcpy(quad, q, 8);
  sum.all = _mm512_dpbusd_epi32(sum.all, digits.even, _mm512_set1_epi32(quad[0]));
  sum.all = _mm512_dpbusd_epi32(sum.all, digits.odd, _mm512_set1_epi32(quad[1]));
}

template <class S>
static inline void widen(S&) {}

static inline void value(const Slim& sum, int32_t codes, float scale, float* y, bool further) {
  const __m512i whole = _mm512_sub_epi32(sum.all, _mm512_set1_epi32(codes));
  __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scale));
  if (further) v = _mm512_add_ps(_mm512_loadu_ps(y), v);
  _mm512_storeu_ps(y, v);
}
static inline void value(const Sum& sum, int32_t codes, float scale, float* y, bool further) {
  value(Slim{_mm512_add_epi32(sum.even, sum.odd)}, codes, scale, y, further);
}

// Integer codes (integer_loops.h).
constexpr int INTEGER_TOKENS = 4, INT8_TOKENS = 8;
constexpr int32_t EXCESS = 128;  // dpbusd takes codes as 1..255

using Floats = __m512;
using Words = __m512i;

static inline Floats zero() { return _mm512_setzero_ps(); }
static inline Words none() { return _mm512_setzero_si512(); }
static inline Words load(const int32_t* from) { return _mm512_loadu_si512(from); }
static inline void store(float* to, Floats from) { _mm512_storeu_ps(to, from); }
static inline void store(int32_t* to, Words from) { _mm512_storeu_si512(to, from); }

// Looks codes up in a table of 16, whose period is the number of codes: the bits above a code do not matter.
template <int BITS>
struct Decoder {
  __m512 table;
  Decoder() {
    alignas(64) float values[16];
    for (int i = 0; i < 16; i++) values[i] = float(int32_t(uint32_t(i) << (32 - BITS)) >> (32 - BITS));
    table = _mm512_load_ps(values);
  }
  Floats operator()(Words words, int field) const {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, BITS * field), table);
  }
};
template <>
struct Decoder<8> {
  Floats operator()(Words words, int field) const {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * field), 24));
  }
};

static inline Floats multiply_add(Floats a, float b, Floats sum) { return _mm512_fmadd_ps(a, _mm512_set1_ps(b), sum); }
static inline Floats scaled(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
static inline Floats added(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Words added(Words a, Words b) { return _mm512_add_epi32(a, b); }
static inline Floats widened(const uint16_t* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}
static inline Words dot4(Words sum, Words words, int32_t quad) {
  return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(quad ^ int32_t(0x80808080)), words);
}
