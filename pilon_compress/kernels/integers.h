// Matrices and banks of integer codes, by teams of threads. Part of products.cpp.

// A matrix of codes, or of 8-bit weights that take 8-bit activations (`sums` given).
struct IntegerMatrix {
  int64_t d_in = 0, d_out = 0, bits = 0, group = 0, groups = 1, length = 0;
  const int32_t *words = nullptr, *sums = nullptr;
  const uint16_t* scales = nullptr;
  const float *scale = nullptr, *bias = nullptr;
  std::vector<int64_t> starts, scale_starts, offsets;
  int64_t latent = 0;  // none

  int64_t tiles() const { return up_to(d_out, TILE) / TILE; }
  int64_t fields() const { return 32 / bits; }
  int64_t last() const { return up_to(d_in - (groups - 1) * group, fields()) / fields(); }
  int64_t read() const {  // floats of a token that the loops read, some of them times codes of zero
    return std::max((groups - 1) * group + last() * fields(), groups > 1 ? (groups - 2) * group + length * fields() : 0);
  }
};

// A bank of codes: A by groups of inputs; B by groups of outputs, whose scales multiply the latent vector.
struct IntegerBank {
  int64_t d_in = 0, d_out = 0, rank = 0, k = 0, group_tiles = 0, B_groups = 1, B_length = 0;
  IntegerMatrix A;                 // its outputs: the components of the selected primitives, in complete tiles
  const int32_t* B = nullptr;
  const uint16_t* B_scales = nullptr;  // (n, groups of outputs, rank)
  const float* weight = nullptr;       // (k, A's components), the composition
  std::vector<int64_t> starts, offsets, selected;

  int64_t tiles() const { return up_to(d_out, TILE) / TILE; }
  int64_t row() const { return B_length * A.fields(); }  // floats of a primitive's scaled latent vector
};

// Inputs of `tokens`, in rows of `read` floats: x itself, or a copy with zeros at the end.
const float* readable(const float* x, int64_t d, int64_t read, int64_t tokens, Buffer<float>& copy) {
  if (read <= d) return x;
  copy.reserve(tokens * read);
  for (int64_t m = 0; m < tokens; m++) {
    std::memcpy(copy.data() + m * read, x + m * d, d * sizeof(float));
    std::memset(copy.data() + m * read + d, 0, (read - d) * sizeof(float));
  }
  return copy.data();
}

IntegerJob job_of(const IntegerMatrix& p, const float* x, int64_t x_stride, int64_t tokens, float* y, int64_t stride) {
  return {p.bits, p.words, p.scales, p.starts.data(), p.scale_starts.data(), p.offsets.data(), p.groups, p.length,
          p.last(), x, x_stride, p.group, 0, int64_t(1) << 40, tokens, y, stride, std::min(p.d_out, stride), nullptr, p.bias};
}

struct IntegerBuffers {  // of one thread, kept from call to call
  Buffer<float> x, latent, scaled;
};
thread_local IntegerBuffers own_integers;

void run(const IntegerMatrix& p, const float* x, float* y, int64_t tokens, Team team, Buffers&) {
  const int64_t begin = team.begin(p.tiles()), end = team.end(p.tiles());
  if (p.sums) {
    Codes& codes = own.x;
    quantise(x, p.d_in, tokens, p.d_in, 0, codes);
    isa().table->int8({p.words, p.sums, p.length, &codes, tokens, y, p.d_out, p.d_out, p.scale, p.bias}, begin, end);
    return;
  }
  const int64_t read = p.read();
  const float* from = readable(x, p.d_in, read, tokens, own_integers.x);
  isa().table->integers(job_of(p, from, std::max(read, p.d_in), tokens, y, p.d_out), begin, end);
}
Buffers& room(const IntegerMatrix&, int64_t) { return own; }

void run(const IntegerBank& p, const float* x, float* y, int64_t tokens, Team team, Buffers& shared) {
  const int64_t latent = p.A.d_out, row = p.row(), wide = p.k * row, each = latent / p.k;
  const int64_t read = p.A.read();
  const float* from = readable(x, p.d_in, read, tokens, own_integers.x);
  float* u = shared.u_up.data();
  IntegerJob job = job_of(p.A, from, std::max(read, p.d_in), tokens, u, latent);
  job.multiply = p.weight;
  isa().table->integers(job, team.begin(p.A.tiles()), team.end(p.A.tiles()));
  team.wait();

  const int64_t begin = team.begin(p.tiles(), p.group_tiles), end = team.end(p.tiles(), p.group_tiles);
  const int64_t first = begin / p.group_tiles, groups = (end - begin + p.group_tiles - 1) / p.group_tiles;
  Buffer<float>& scaled = own_integers.scaled;
  scaled.reserve(tokens * groups * wide);
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t g = 0; g < groups; g++) {
      float* to = scaled.data() + (m * groups + g) * wide;
      for (int64_t i = 0; i < p.k; i++, to += row) {
        const uint16_t* scales = p.B_scales + (p.selected[i] * p.B_groups + first + g) * p.rank;
        const float* part = u + m * latent + i * each;
        for (int64_t j = 0; j < p.rank; j++) {
          const uint32_t bits = uint32_t(scales[j]) << 16;
          float scale;
          std::memcpy(&scale, &bits, 4);
          to[j] = part[j] * scale;
        }
        std::memset(to + p.rank, 0, (row - p.rank) * sizeof(float));
      }
    }
  IntegerJob second = {p.A.bits, p.B, nullptr, p.starts.data(), nullptr, p.offsets.data(), p.k, p.B_length, p.B_length,
                       scaled.data() - first * wide, groups * wide, row, wide, p.group_tiles, tokens, y, p.d_out, p.d_out,
                       nullptr, nullptr};
  isa().table->integers(second, begin, end);
  team.wait();  // the next tokens reuse these buffers
}
Buffers& room(const IntegerBank& p, int64_t tokens) {
  own.u_up.reserve(tokens * p.A.d_out);
  return own;
}
