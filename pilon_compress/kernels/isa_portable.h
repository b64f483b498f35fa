// Plain C++ for every machine; tests compare the others with it. Layout of a block: isa_vnni.h.
constexpr int WIDE_TILES = 1, WIDE_FROM = 1, ONE_TILES = 1, MANY_TILES = 1, MANY_TOKENS = 4, ROWS = 1, ONE_ROWS = 1;
constexpr int64_t WIDEN = int64_t(1) << 40;

struct Sum { int32_t v[TILE]; };
using Slim = Sum;
struct Digits { uint8_t v[TILE][BLOCK]; };

static inline void clear(Sum& sum) { sum = {}; }

static inline Digits unpack(const uint8_t* from) {
  Digits digits;
  for (int field = 0; field < 4; field++)
    for (int j = 0; j < BYTES; j++) digits.v[field / 2 * 8 + j / 4][field % 2 * 4 + j % 4] = from[j] >> 2 * field & 3;
  return digits;
}

static inline void add(Sum& sum, const Digits& digits, const int8_t* q) {
  for (int j = 0; j < TILE; j++)
    for (int k = 0; k < BLOCK; k++) sum.v[j] += int32_t(digits.v[j][k]) * q[k];
}

static inline void widen(Sum&) {}

static inline void value(const Sum& sum, int32_t codes, float scale, float* y, bool further) {
  for (int j = 0; j < TILE; j++) {
    const float v = float(sum.v[j] - codes) * scale;
    y[j] = further ? y[j] + v : v;
  }
}

template <int R>
static inline void dot_int8(const int8_t* w, const int8_t* q, int64_t d, int32_t* out) {
  for (int r = 0; r < R; r++) {
    int32_t sum = 0;
    for (int64_t k = 0; k < d; k++) sum += int32_t(w[r * d + k]) * q[k];
    out[r] = sum;
  }
}
