// NEON, with the dot product instructions of ARMv8.2 where PILON_DOT is 1. Layout of a block: isa_vnni.h.
constexpr int WIDE_TILES = 4, WIDE_FROM = 48, ONE_TILES = 2, MANY_TILES = 1, MANY_TOKENS = 4;
constexpr int64_t WIDEN = int64_t(1) << 40;

struct Sum { int32x4_t v[4]; };  // four outputs each
using Slim = Sum;
struct Digits { int8x16_t field[4][2]; };

static inline void clear(Sum& sum) {
  const int32x4_t none = vdupq_n_s32(0);
  sum = {{none, none, none, none}};
}

static inline Digits unpack(const uint8_t* from) {
  const uint8x16_t low = vdupq_n_u8(3);
  Digits digits;
  UNROLL for (int half = 0; half < 2; half++) {
    const uint8x16_t packed = vld1q_u8(from + 16 * half);
    digits.field[0][half] = vreinterpretq_s8_u8(vandq_u8(packed, low));
    digits.field[1][half] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(packed, 2), low));
    digits.field[2][half] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(packed, 4), low));
    digits.field[3][half] = vreinterpretq_s8_u8(vshrq_n_u8(packed, 6));
  }
  return digits;
}

// Adds the products of four neighbours to each int32.
static inline int32x4_t dot4(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if PILON_DOT
  return vdotq_s32(sum, a, b);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_s8(vget_high_s8(a), vget_high_s8(b));
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

static inline void add(Sum& sum, const Digits& digits, const int8_t* q) {
  int32_t quad[2];
  std::memcpy(quad, q, 8);
  const int8x16_t even = vreinterpretq_s8_s32(vdupq_n_s32(quad[0])), odd = vreinterpretq_s8_s32(vdupq_n_s32(quad[1]));
  UNROLL for (int four = 0; four < 4; four++) {
    const int field = four / 2 * 2, half = four % 2;
    sum.v[four] = dot4(dot4(sum.v[four], digits.field[field][half], even), digits.field[field + 1][half], odd);
  }
}

static inline void widen(Sum&) {}

static inline void value(const Sum& sum, int32_t codes, float scale, float* y, bool further) {
  UNROLL for (int four = 0; four < 4; four++) {
    float32x4_t v = vmulq_n_f32(vcvtq_f32_s32(vsubq_s32(sum.v[four], vdupq_n_s32(codes))), scale);
    if (further) v = vaddq_f32(vld1q_f32(y + 4 * four), v);
    vst1q_f32(y + 4 * four, v);
  }
}

// Integer codes (integer_loops.h).
constexpr int INTEGER_TOKENS = 2, INT8_TOKENS = 4;
constexpr int32_t EXCESS = 0;  // of a code as dot4 takes it

struct Floats { float32x4_t v[4]; };
struct Words { int32x4_t v[4]; };

static inline Floats zero() {
  const float32x4_t z = vdupq_n_f32(0);
  return {{z, z, z, z}};
}
static inline Words none() {
  const int32x4_t z = vdupq_n_s32(0);
  return {{z, z, z, z}};
}
static inline Words load(const int32_t* from) {
  return {{vld1q_s32(from), vld1q_s32(from + 4), vld1q_s32(from + 8), vld1q_s32(from + 12)}};
}
static inline void store(float* to, const Floats& from) { UNROLL for (int i = 0; i < 4; i++) vst1q_f32(to + 4 * i, from.v[i]); }
static inline void store(int32_t* to, const Words& from) { UNROLL for (int i = 0; i < 4; i++) vst1q_s32(to + 4 * i, from.v[i]); }

template <int BITS>
struct Decoder {
  Floats operator()(const Words& words, int field) const {
    const int32x4_t up = vdupq_n_s32(32 - BITS * (field + 1)), down = vdupq_n_s32(BITS - 32);
    Floats code;
    UNROLL for (int i = 0; i < 4; i++) code.v[i] = vcvtq_f32_s32(vshlq_s32(vshlq_s32(words.v[i], up), down));
    return code;
  }
};

static inline Floats multiply_add(const Floats& a, float b, Floats sum) {
  UNROLL for (int i = 0; i < 4; i++) sum.v[i] = vfmaq_n_f32(sum.v[i], a.v[i], b);
  return sum;
}
static inline Floats scaled(const Floats& a, const Floats& b, Floats sum) {
  UNROLL for (int i = 0; i < 4; i++) sum.v[i] = vfmaq_f32(sum.v[i], a.v[i], b.v[i]);
  return sum;
}
static inline Floats added(Floats a, const Floats& b) {
  UNROLL for (int i = 0; i < 4; i++) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
  return a;
}
static inline Words added(Words a, const Words& b) {
  UNROLL for (int i = 0; i < 4; i++) a.v[i] = vaddq_s32(a.v[i], b.v[i]);
  return a;
}
static inline Floats widened(const uint16_t* from) {
  Floats wide;
  UNROLL for (int i = 0; i < 4; i++) wide.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16));
  return wide;
}
static inline Words dot4(Words sum, const Words& words, int32_t quad) {
  const int8x16_t codes = vreinterpretq_s8_s32(vdupq_n_s32(quad));
  UNROLL for (int i = 0; i < 4; i++) sum.v[i] = dot4(sum.v[i], vreinterpretq_s8_s32(words.v[i]), codes);
  return sum;
}
