// AVX2: maddubs multiplies stored weights (u8, 0..2) by codes (s8) and adds neighbours into int16.
//
// A block adds two such products to each int16: at most 2 · (2·2·127) = 1016, so 32 blocks stay below 2^15 and the sums
// are widened to int32 then. Layout of a block: isa_vnni.h.
constexpr int WIDE_TILES = 8, WIDE_FROM = 48, ONE_TILES = 2, MANY_TILES = 1, MANY_TOKENS = 4, ROWS = 4, ONE_ROWS = 1;
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

constexpr int64_t AHEAD = 4096;  // bytes; rows one by one are one long stream, which memory gives fastest

// Multiplies |w| (u8, up to 128) with the code times w's sign: at most 2·128·127 = 32512 in an int16.
template <int R>
static inline void dot_int8(const int8_t* w, const int8_t* q, int64_t d, int32_t* out) {
  const __m256i one = _mm256_set1_epi16(1);
  __m256i sum[R];
  UNROLL for (int r = 0; r < R; r++) sum[r] = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 32 <= d; k += 32) {
    const __m256i codes = _mm256_loadu_si256((const __m256i*)(q + k));
    UNROLL for (int r = 0; r < R; r++) {
      __builtin_prefetch(w + (R == 1 ? AHEAD : (R + r) * d) + k);  // the next R rows, or farther in the stream
      const __m256i row = _mm256_loadu_si256((const __m256i*)(w + r * d + k));
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(row), _mm256_sign_epi8(codes, row));
      sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(pairs, one));
    }
  }
  UNROLL for (int r = 0; r < R; r++) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum[r]), _mm256_extracti128_si256(sum[r], 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1));
    out[r] = _mm_cvtsi128_si32(half);
    for (int64_t i = k; i < d; i++) out[r] += int32_t(w[r * d + i]) * q[i];
  }
}
