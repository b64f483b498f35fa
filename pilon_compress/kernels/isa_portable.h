// Plain C++ for every machine; tests compare the others with it. Layout of a block: isa_vnni.h.
constexpr int WIDE_TILES = 1, WIDE_FROM = 1, ONE_TILES = 1, MANY_TILES = 1, MANY_TOKENS = 4;
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

// Integer codes (integer_loops.h).
constexpr int INTEGER_TOKENS = 2, INT8_TOKENS = 2;
constexpr int32_t EXCESS = 0;  // of a code as dot4 takes it

struct Floats { float v[TILE]; };
struct Words { int32_t v[TILE]; };

static inline Floats zero() { return {}; }
static inline Words none() { return {}; }
static inline Words load(const int32_t* from) {
  Words words;
  std::memcpy(words.v, from, sizeof words.v);
  return words;
}
static inline void store(float* to, const Floats& from) { std::memcpy(to, from.v, sizeof from.v); }
static inline void store(int32_t* to, const Words& from) { std::memcpy(to, from.v, sizeof from.v); }

template <int BITS>
struct Decoder {
  Floats operator()(const Words& words, int field) const {
    Floats code;
    for (int j = 0; j < TILE; j++) code.v[j] = float(int32_t(uint32_t(words.v[j]) << (32 - BITS * (field + 1))) >> (32 - BITS));
    return code;
  }
};

static inline Floats multiply_add(const Floats& a, float b, Floats sum) {
  for (int j = 0; j < TILE; j++) sum.v[j] += a.v[j] * b;
  return sum;
}
static inline Floats scaled(const Floats& a, const Floats& b, Floats sum) {
  for (int j = 0; j < TILE; j++) sum.v[j] += a.v[j] * b.v[j];
  return sum;
}
static inline Floats added(Floats a, const Floats& b) {
  for (int j = 0; j < TILE; j++) a.v[j] += b.v[j];
  return a;
}
static inline Words added(Words a, const Words& b) {
  for (int j = 0; j < TILE; j++) a.v[j] += b.v[j];
  return a;
}

// Converts bfloat16 to float32.
static inline Floats widened(const uint16_t* from) {
  Floats wide;
  for (int j = 0; j < TILE; j++) {
    const uint32_t bits = uint32_t(from[j]) << 16;
    std::memcpy(&wide.v[j], &bits, 4);
  }
  return wide;
}

// Adds the products of four int8 weights with the four codes of `quad`.
static inline Words dot4(Words sum, const Words& words, int32_t quad) {
  for (int j = 0; j < TILE; j++)
    for (int k = 0; k < 4; k++) sum.v[j] += int32_t(int8_t(words.v[j] >> 8 * k)) * int8_t(quad >> 8 * k);
  return sum;
}
