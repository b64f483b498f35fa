// The loops of every instruction set, compiled once for each inside its namespace: no include guard on purpose.
//
// isa_*.h comes first, with `Sum` and `Slim` (16 exact sums, one per output of a tile; Slim takes fewer registers),
// `Digits` (a block, unpacked), unpack(), clear(), add(), widen(), value(), and the strip sizes that fill its registers.

// Quantises `groups` groups of one token x (d), from `first` on. Rounds half to even by adding and subtracting 1.5·2^23:
// plain arithmetic that compilers vectorise. Magnitudes are compared as integers: NaN is the largest.
static void quantise(const float* x, int64_t d, int64_t token, int64_t first, int64_t groups, Codes& codes) {
  constexpr float MAGIC = 12582912.0f;
  constexpr int32_t MAGIC_BITS = 0x4B400000, INFINITE = 0x7F800000;
  int8_t* row = codes.q.data() + token * codes.stride;
  for (int64_t g = first; g < first + groups; g++) {
    const int64_t begin = g * codes.group, n = std::min(codes.group, d - begin);
    const float* from = x + begin;
    int8_t* q = row + begin;
    int32_t bits = 0;
    for (int64_t i = 0; i < n; i++) {
      int32_t one;
      std::memcpy(&one, from + i, 4);
      bits = std::max(bits, one & 0x7FFFFFFF);
    }
    float largest;
    std::memcpy(&largest, &bits, 4);
    const bool finite = bits < INFINITE;
    largest = finite ? std::max(largest, 1e-20f) : 1.0f;
    const float inverse = finite ? 1.0f / largest * 127.0f : 0.0f;  // torch computes 127 / tensor in these two steps
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
      const float shifted = (finite ? from[i] * inverse : 0.0f) + MAGIC;
      int32_t code;
      std::memcpy(&code, &shifted, 4);
      code -= MAGIC_BITS;
      sum += code;
      q[i] = int8_t(code);
    }
    codes.sums.data()[codes.index(token, g)] = sum;
    codes.scales.data()[codes.index(token, g)] = finite ? largest / 127.0f : __builtin_nanf("");
  }
  if (first + groups == codes.groups) std::memset(row + d, 0, codes.stride - d);
}

// Computes T tiles x M tokens; a block is unpacked once for all tokens.
template <int T, int M>
static void strip(const Job& job, int64_t tile, int64_t token) {
  const Codes& in = *job.in;
  const uint8_t* w[T];
  UNROLL for (int t = 0; t < T; t++) w[t] = job.base + job.starts[tile + t];
  const uint8_t* soon[T];
  UNROLL for (int t = 0; t < T; t++)
    soon[t] = job.base + job.starts[std::min(tile + T + t, job.tiles - 1)];
  const int8_t* q[M];
  UNROLL for (int m = 0; m < M; m++) q[m] = in.q.data() + (token + m) * in.stride;
  std::conditional_t<M == 1 && T <= ONE_TILES, Sum, Slim> sum[T][M];
  UNROLL for (int t = 0; t < T; t++) UNROLL for (int m = 0; m < M; m++) clear(sum[t][m]);
  alignas(64) float y[T][M][TILE];
  const bool grouped = in.groups > 1;
  int64_t narrow = 0;  // blocks since sums were widened
  for (int64_t i = 0; i < job.segments; i++) {
    const int64_t n = i + 1 < job.segments ? job.blocks : job.last, at = job.offsets[i];
    for (int64_t b = 0; b < n;) {
      const int64_t stop = std::min(n, b + WIDEN - narrow);
      narrow += stop - b;
      for (; b < stop; b++) {
        UNROLL for (int t = 0; t < T; t++) {
          const uint8_t* from = w[t] + at + b * BYTES;
          if (M == 1) __builtin_prefetch(soon[t] + at + b * BYTES);
          const Digits digits = unpack(from);
          UNROLL for (int m = 0; m < M; m++) add(sum[t][m], digits, q[m] + b * BLOCK);
        }
      }
      if (narrow < WIDEN) continue;
      UNROLL for (int t = 0; t < T; t++) UNROLL for (int m = 0; m < M; m++) widen(sum[t][m]);
      narrow = 0;
    }
    UNROLL for (int m = 0; m < M; m++) q[m] += n * BLOCK;
    if (!grouped && i + 1 < job.segments) continue;
    const int64_t g = grouped ? i : 0;
    UNROLL for (int t = 0; t < T; t++) UNROLL for (int m = 0; m < M; m++) widen(sum[t][m]);
    narrow = 0;
    UNROLL for (int m = 0; m < M; m++) {
      const int64_t index = in.index(token + m, g);
      UNROLL for (int t = 0; t < T; t++) {
        value(sum[t][m], in.sums.data()[index], in.scales.data()[index], y[t][m], g > 0);
        clear(sum[t][m]);
      }
    }
  }
  UNROLL for (int t = 0; t < T; t++) {
    const int64_t first = (tile + t) * TILE, n = std::min(TILE, job.width - first);
    UNROLL for (int m = 0; m < M; m++) {
      float *from = y[t][m], *to = job.out + (token + m) * job.stride + first;
      if (n < TILE) {
        for (int64_t j = 0; j < n; j++) {
          float v = from[j];
          if (job.multiply) v = v * job.multiply[first + j];
          if (job.add) v = v + job.add[first + j];
          to[j] = v;
        }
        continue;
      }
      if (job.multiply)
        for (int64_t j = 0; j < TILE; j++) from[j] = from[j] * job.multiply[first + j];
      if (job.add)
        for (int64_t j = 0; j < TILE; j++) from[j] = from[j] + job.add[first + j];
      std::memcpy(to, from, TILE * sizeof(float));
    }
  }
}

// Computes the tokens from `token` on for T tiles, M at a time, the rest by halves.
template <int T, int M>
static void strips(const Job& job, int64_t tile, int64_t token) {
  for (; token + M <= job.tokens; token += M) strip<T, M>(job, tile, token);
  if constexpr (M > 1) strips<T, M / 2>(job, tile, token);
}

static void tiles(const Job& job, int64_t begin, int64_t end) {
  int64_t tile = begin;
  if (job.tokens > 1) {
    for (; tile + MANY_TILES <= end; tile += MANY_TILES) strips<MANY_TILES, MANY_TOKENS>(job, tile, 0);
    for (; tile < end; tile++) strips<1, MANY_TOKENS>(job, tile, 0);
  } else {
    // Many primitives are as many streams of bytes, which evict each other from the L1: take longer runs of each.
    if (job.in->groups == 1 && job.segments >= WIDE_FROM)
      for (; tile + WIDE_TILES <= end; tile += WIDE_TILES) strip<WIDE_TILES, 1>(job, tile, 0);
    for (; tile + ONE_TILES <= end; tile += ONE_TILES) strip<ONE_TILES, 1>(job, tile, 0);
    for (; tile < end; tile++) strip<1, 1>(job, tile, 0);
  }
}

// h = act(h), or act(gate)·h. NaN stays NaN, as in torch; each step is a plain loop, which compilers vectorise.
static void activate(float* h, const float* gate, int64_t n, int64_t activation) {
  const bool square = activation == RELU2;
  const float* from = gate ? gate : h;
  float part[64];
  for (int64_t done = 0; done < n; done += 64) {
    const int64_t count = std::min<int64_t>(64, n - done);
    for (int64_t i = 0; i < count; i++) part[i] = from[done + i] < 0.0f ? 0.0f : from[done + i];
    if (square)
      for (int64_t i = 0; i < count; i++) part[i] = part[i] * part[i];
    if (gate)
      for (int64_t i = 0; i < count; i++) part[i] = part[i] * h[done + i];
    std::memcpy(h + done, part, count * sizeof(float));
  }
}
