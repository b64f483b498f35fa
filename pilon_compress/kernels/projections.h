// Ternary projections and feed-forward blocks, by teams of threads. Part of products.cpp.

void quantise(const float* x, int64_t stride, int64_t tokens, int64_t d, int64_t group, Codes& codes) {
  codes.reserve(tokens, d, group);
  for (int64_t m = 0; m < tokens; m++) isa().table->quantise(x + m * stride, d, m, 0, codes.groups, codes);
}

// A projection: two products through the bank, or (B null) one with the dense matrix A.
struct Projection {
  const uint8_t *A = nullptr, *B = nullptr;
  const float *scale = nullptr, *shift = nullptr, *bias = nullptr;
  int64_t d_in = 0, d_out = 0, latent = 0, group = 0;
  std::vector<int64_t> starts, offsets, B_starts, B_offsets;
  int64_t rank_blocks = 0;

  int64_t d_out_tiles() const { return up_to(d_out, TILE) / TILE; }

  Job first(const Codes& in, int64_t tokens) const {  // the product with A
    const int64_t total = up_to(d_in, BLOCK) / BLOCK, blocks = in.groups == 1 ? total : in.group / BLOCK;
    return {A, int64_t(starts.size()), starts.data(), offsets.data(), in.groups, blocks,
            total - (in.groups - 1) * blocks, &in, tokens};
  }
  void into_latent(const Codes& in, int64_t tokens, float* u, Team team) const {
    if (!B) return;
    Job job = first(in, tokens);
    job.out = u, job.stride = job.width = latent, job.multiply = scale, job.add = shift;
    isa().table->tiles(job, team.begin(latent / TILE), team.end(latent / TILE));
  }
  // Outputs of tiles begin to end, from the codes of the latent (or of the input, where there is no latent).
  void out_of(const Codes& in, int64_t tokens, float* y, int64_t stride, int64_t begin, int64_t end) const {
    Job job = B ? Job{B, int64_t(B_starts.size()), B_starts.data(), B_offsets.data(), int64_t(B_offsets.size()), rank_blocks,
                      rank_blocks, &in, tokens}
                : first(in, tokens);
    job.out = y, job.stride = stride, job.width = std::min(d_out, stride), job.multiply = B ? nullptr : scale;
    job.add = bias;
    isa().table->tiles(job, begin, end);
  }
};

struct Buffers {  // of one thread, kept from call to call
  Codes x, up, gate, hidden, down;
  Buffer<float> u_up, u_gate, u_down, h_up, h_gate;
};
thread_local Buffers own;

// Codes of the latent; every member of a team makes its own, which costs less than to wait for another's.
const Codes& latent_codes(const Projection& p, const Codes& in, const float* u, int64_t tokens, Codes& codes) {
  if (!p.B) return in;
  quantise(u, p.latent, tokens, p.latent, 0, codes);
  return codes;
}

struct Ffn {
  Projection up, gate, down;
  bool gated = false;
  int64_t activation = RELU2;
};

void project(const Projection& p, const float* x, float* y, int64_t tokens, Team team, Buffers& shared) {
  Buffers& mine = own;
  quantise(x, p.d_in, tokens, p.d_in, p.group, mine.x);
  p.into_latent(mine.x, tokens, shared.u_up.data(), team);
  team.wait();
  const Codes& codes = latent_codes(p, mine.x, shared.u_up.data(), tokens, mine.up);
  p.out_of(codes, tokens, y, p.d_out, team.begin(p.d_out_tiles()), team.end(p.d_out_tiles()));
}

void feed_forward(const Ffn& f, const float* x, float* y, int64_t tokens, Team team, Buffers& shared) {
  Buffers& mine = own;
  const int64_t tiles = f.up.d_out_tiles(), width = tiles * TILE, hidden = f.up.d_out;
  float *h = shared.h_up.data(), *g = f.gated ? shared.h_gate.data() : nullptr;

  quantise(x, f.up.d_in, tokens, f.up.d_in, f.up.group, mine.x);
  f.up.into_latent(mine.x, tokens, shared.u_up.data(), team);
  if (f.gated) f.gate.into_latent(mine.x, tokens, shared.u_gate.data(), team);
  team.wait();

  // A member owns complete groups of hidden values, so that it can quantise its own results.
  const int64_t unit = f.down.group ? f.down.group / TILE : 1;
  const int64_t begin = team.begin(tiles, unit), end = team.end(tiles, unit);
  f.up.out_of(latent_codes(f.up, mine.x, shared.u_up.data(), tokens, mine.up), tokens, h, width, begin, end);
  if (f.gated)
    f.gate.out_of(latent_codes(f.gate, mine.x, shared.u_gate.data(), tokens, mine.gate), tokens, g, width, begin, end);
  const int64_t first = begin * TILE, count = (end - begin) * TILE;
  for (int64_t m = 0; m < tokens && count > 0; m++) {
    isa().table->activate(h + m * width + first, g ? g + m * width + first : nullptr, count, f.activation);
    if (f.down.group)
      isa().table->quantise(h + m * width, hidden, m, begin / unit, (end - begin + unit - 1) / unit, shared.hidden);
  }
  team.wait();

  const Codes* codes = &shared.hidden;
  if (!f.down.group) quantise(h, width, tokens, hidden, 0, mine.hidden), codes = &mine.hidden;
  f.down.into_latent(*codes, tokens, shared.u_down.data(), team);
  team.wait();
  const Codes& last = latent_codes(f.down, *codes, shared.u_down.data(), tokens, mine.down);
  f.down.out_of(last, tokens, y, f.down.d_out, team.begin(f.down.d_out_tiles()), team.end(f.down.d_out_tiles()));
  team.wait();  // the next tokens reuse these buffers
}

// Returns this thread's buffers with space for `tokens` at a time.
Buffers& room(const Ffn& f, int64_t tokens) {
  own.u_up.reserve(tokens * f.up.latent), own.u_gate.reserve(f.gated ? tokens * f.gate.latent : 0);
  own.u_down.reserve(tokens * f.down.latent);
  for (Buffer<float>* h : {&own.h_up, &own.h_gate}) h->reserve(tokens * f.up.d_out_tiles() * TILE);
  if (f.down.group) own.hidden.reserve(tokens, f.up.d_out, f.down.group);
  return own;
}
Buffers& room(const Projection& p, int64_t tokens) {
  own.u_up.reserve(tokens * p.latent);
  return own;
}
void run(const Ffn& f, const float* x, float* y, int64_t n, Team t, Buffers& b) { feed_forward(f, x, y, n, t, b); }
void run(const Projection& p, const float* x, float* y, int64_t n, Team t, Buffers& b) { project(p, x, y, n, t, b); }
