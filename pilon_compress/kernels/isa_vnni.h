// AVX-512 with VNNI: dpbusd multiplies the stored weights (u8) by codes (s8) straight into int32, sixteen outputs at once.
//
// A block of 32 bytes, bits 2f and 2f+1 of byte j: field f = 0, 1 holds outputs 0-7 and inputs 0-3, 4-7; fields 2, 3
// the same for outputs 8-15. Output = j / 4, input = j % 4 within a field.
constexpr int WIDE_TILES = 16, WIDE_FROM = 8, ONE_TILES = 4, MANY_TILES = 2, MANY_TOKENS = 8, ROWS = 4, ONE_ROWS = 4;
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

// R rows of int8 weights with one token. Codes are shifted to 1..255 for dpbusd; the excess is summed and subtracted.
template <int R>
static inline void dot_int8(const int8_t* w, const int8_t* q, int64_t d, int32_t* out) {
  const __m512i move = _mm512_set1_epi8(-128);
  __m512i sum[R], moved[R];
  UNROLL for (int r = 0; r < R; r++) sum[r] = moved[r] = _mm512_setzero_si512();
  for (int64_t k = 0; k < d; k += 64) {
    const __mmask64 mask = d - k >= 64 ? ~__mmask64(0) : (__mmask64(1) << (d - k)) - 1;
    const __m512i codes = _mm512_xor_si512(_mm512_loadu_si512(q + k), move);
    UNROLL for (int r = 0; r < R; r++) {
      __builtin_prefetch(w + (R + r) * d + k);  // the next R rows
      const __m512i row = _mm512_maskz_loadu_epi8(mask, w + r * d + k);
      sum[r] = _mm512_dpbusd_epi32(sum[r], codes, row);
      moved[r] = _mm512_dpbusd_epi32(moved[r], move, row);
    }
  }
  UNROLL for (int r = 0; r < R; r++) out[r] = _mm512_reduce_add_epi32(_mm512_sub_epi32(sum[r], moved[r]));
}
