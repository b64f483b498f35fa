// Loops over integer codes for every instruction set, compiled once for each inside its namespace: no include guard.
//
// isa_*.h comes first, with `Floats` and `Words` (16 of each, one per output of a tile), `Decoder<bits>`, zero(),
// multiply_add(), added(), scaled(), widened(), store() and dot4(). A word of an output holds the codes of FIELDS<bits>
// consecutive inputs, in two's complement, the first lowest.

// Sums of a run go to two chains, by the parity of the input within its word, and are added at its end: the numbers of a
// token do not depend on the tokens beside it.
template <int BITS, int M>
static void integer_strip(const IntegerJob& job, int64_t tile, int64_t token) {
  constexpr int N = FIELDS<BITS>;
  const Decoder<BITS> decoder;
  const int32_t* words = job.words + job.starts[tile];
  const uint16_t* scales = job.scales ? job.scales + job.scale_starts[tile] : nullptr;
  const float* x[M];
  UNROLL for (int m = 0; m < M; m++) x[m] = job.x + (token + m) * job.x_stride + tile / job.x_tiles * job.x_group;
  Floats total[M];
  UNROLL for (int m = 0; m < M; m++) total[m] = zero();
  for (int64_t i = 0; i < job.runs; i++) {
    const int32_t* at = words + job.offsets[i];
    const int64_t n = i + 1 < job.runs ? job.length : job.last;
    Floats even[M], odd[M];
    UNROLL for (int m = 0; m < M; m++) even[m] = odd[m] = zero();
    for (int64_t w = 0; w < n; w++, at += TILE) {
      if (M == 1) __builtin_prefetch(reinterpret_cast<const char*>(at) + AHEAD);
      const Words word = load(at);
      UNROLL for (int f = 0; f < N; f++) {
        const Floats code = decoder(word, f);
        UNROLL for (int m = 0; m < M; m++) {
          Floats& sum = f % 2 ? odd[m] : even[m];
          sum = multiply_add(code, x[m][w * N + f], sum);
        }
      }
    }
    UNROLL for (int m = 0; m < M; m++) {
      const Floats sum = added(even[m], odd[m]);
      total[m] = scales ? scaled(sum, widened(scales + i * TILE), total[m]) : added(total[m], sum);
      x[m] += job.x_step;
    }
  }
  alignas(64) float y[TILE];
  const int64_t first = tile * TILE, n = std::min(TILE, job.width - first);
  UNROLL for (int m = 0; m < M; m++) {
    store(y, total[m]);
    float* to = job.out + (token + m) * job.stride + first;
    for (int64_t j = 0; j < n; j++) {
      float v = y[j];
      if (job.multiply) v = v * job.multiply[first + j];
      if (job.add) v = v + job.add[first + j];
      to[j] = v;
    }
  }
}

template <int BITS>
static void integer_tiles_of(const IntegerJob& job, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; tile++) {
    int64_t token = 0;
    for (; token + INTEGER_TOKENS <= job.tokens; token += INTEGER_TOKENS) integer_strip<BITS, INTEGER_TOKENS>(job, tile, token);
    for (; token < job.tokens; token++) integer_strip<BITS, 1>(job, tile, token);
  }
}

static void integer_tiles(const IntegerJob& job, int64_t begin, int64_t end) {
  switch (job.bits) {
    case 2: return integer_tiles_of<2>(job, begin, end);
    case 3: return integer_tiles_of<3>(job, begin, end);
    case 4: return integer_tiles_of<4>(job, begin, end);
    default: return integer_tiles_of<8>(job, begin, end);
  }
}

// 8-bit weights and 8-bit activations: sums are exact integers, in as many chains as keep the multipliers busy.
template <int M>
static void int8_strip(const Int8Job& job, int64_t tile, int64_t token) {
  constexpr int CHAINS = M == 1 ? 4 : M <= 4 ? 2 : 1;
  const int32_t* at = job.words + tile * job.length * TILE;
  const int8_t* q[M];
  UNROLL for (int m = 0; m < M; m++) q[m] = job.in->q.data() + (token + m) * job.in->stride;
  Words sum[M][CHAINS];
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int c = 0; c < CHAINS; c++) sum[m][c] = none();
  const int64_t unrolled = job.length / CHAINS * CHAINS;
  const auto step = [&](int64_t w, int c) __attribute__((always_inline)) {
    if (M == 1) __builtin_prefetch(reinterpret_cast<const char*>(at + w * TILE) + AHEAD);
    const Words word = load(at + w * TILE);
    UNROLL for (int m = 0; m < M; m++) {
      int32_t quad;
      std::memcpy(&quad, q[m] + 4 * w, 4);
      sum[m][c] = dot4(sum[m][c], word, quad);
    }
  };
  for (int64_t w = 0; w < unrolled; w += CHAINS) UNROLL for (int c = 0; c < CHAINS; c++) step(w + c, c);
  for (int64_t w = unrolled; w < job.length; w++) step(w, 0);
  alignas(64) int32_t whole[TILE];
  const int64_t first = tile * TILE, n = std::min(TILE, job.width - first);
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int c = 1; c < CHAINS; c++) sum[m][0] = added(sum[m][0], sum[m][c]);
    store(whole, sum[m][0]);
    const float by = job.in->scales.data()[token + m];
    float* to = job.out + (token + m) * job.stride + first;
    for (int64_t j = 0; j < n; j++) {
      const float y = float(whole[j] - EXCESS * job.sums[first + j]) * by * job.scale[first + j];
      to[j] = job.add ? y + job.add[first + j] : y;
    }
  }
}

static void int8_tiles(const Int8Job& job, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; tile++) {
    int64_t token = 0;
    for (; token + INT8_TOKENS <= job.tokens; token += INT8_TOKENS) int8_strip<INT8_TOKENS>(job, tile, token);
    for (; token < job.tokens; token++) int8_strip<1>(job, tile, token);
  }
}

static const Table table = {quantise, tiles, activate, integer_tiles, int8_tiles};
