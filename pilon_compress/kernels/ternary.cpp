// PILON's ternary projections on the CPU: operators on torch's stable ABI, so one library serves every Python.
//
//   x --quantise--> (q, s) --A--> u = int·s·scale + shift --quantise--> (q', s') --B--> y = int·s' + bias
//
// `int` are exact integer sums, and every float32 operation stands in the order of reference.py, without fused
// multiply-adds (-ffp-contract=off): the results are equal bit for bit, on every instruction set.
//
// A team of threads shares the output tiles of one call; with many tokens each thread takes tokens of its own instead.
// Reading order: this file down to `Table`, loops.h (what every instruction set runs), isa_vnni.h, then the rest here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <variant>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#ifdef __linux__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t TILE = 16;    // outputs of a tile
constexpr int64_t BLOCK = 8;    // inputs of a block
constexpr int64_t BYTES = 32;   // of a block: TILE x BLOCK weights of two bits
constexpr int64_t CHUNK = 16;   // tokens that are carried through a whole FFN together: their hidden values fit the L2
constexpr int64_t PADDED = 64;  // codes of a token are padded with zeros to a multiple of the widest vector

int64_t up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory that is kept from call to call. It starts at a cache line, so that threads with shares of it do not fight.
template <class T>
struct Buffer {
  struct alignas(64) Line { T v[64 / sizeof(T)]; };
  std::vector<Line> lines;
  void reserve(int64_t n) {
    const size_t needed = (n * sizeof(T) + 63) / 64;
    if (lines.size() < needed) lines.resize(needed);
  }
  T* data() { return reinterpret_cast<T*>(lines.data()); }
  const T* data() const { return reinterpret_cast<const T*>(lines.data()); }
};

// Quantised activations ("codes"): q (tokens, stride), and the scale and code sum of each group of a token.
// Ternary weights are stored as 0, 1, 2, so that a product is  sum(stored * q) - sum(q).
struct Codes {
  Buffer<int8_t> q;
  Buffer<int32_t> sums;   // by group and token: a group, hence a cache line, is made by one thread
  Buffer<float> scales;
  int64_t stride = 0, groups = 1, group = 0, tokens = 0;

  int64_t index(int64_t token, int64_t g) const { return g * tokens + token; }
  void reserve(int64_t count, int64_t d, int64_t per_scale) {
    stride = up_to(d, PADDED), tokens = up_to(count, 16);
    group = per_scale > 0 && per_scale < d ? per_scale : d;
    groups = (d + group - 1) / group;
    q.reserve(count * stride), sums.reserve(tokens * groups), scales.reserve(tokens * groups);
  }
};

// A product of codes and weights. A tile's blocks lie in segments: one for each group of inputs that share a scale
// (A), or one for each selected primitive (B), whose bytes are read where the shared bank has them.
struct Job {
  const uint8_t* base;
  int64_t tiles;
  const int64_t *starts, *offsets;    // bytes: of each tile, and of each segment from a tile's start
  int64_t segments, blocks, last;     // blocks of a segment, and of the last one
  const Codes* in;
  int64_t tokens;
  float* out;
  int64_t stride, width;              // of `out`: floats from token to token, and those that exist
  const float *multiply, *add;        // by output, or null
};

struct Int8Job {
  const int8_t* weight;               // (rows, d)
  int64_t d;
  const Codes* in;
  int64_t tokens;
  float* out;
  int64_t stride;
  const float *scale, *bias;          // by row; bias or null
};

enum Activation : int64_t { RELU = 0, RELU2 = 1 };

// The functions of one instruction set.
struct Table {
  void (*quantise)(const float* x, int64_t d, int64_t token, int64_t first_group, int64_t groups, Codes& codes);
  void (*tiles)(const Job& job, int64_t begin, int64_t end);
  void (*activate)(float* h, const float* gate, int64_t n, int64_t activation);
  void (*int8_rows)(const Int8Job& job, int64_t begin, int64_t end);
};

#define UNROLL _Pragma("GCC unroll 16")

namespace portable {
#include "isa_portable.h"
#include "loops.h"
}  // namespace portable

#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {
#include "isa_avx2.h"
#include "loops.h"
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif
namespace vnni {
#include "isa_vnni.h"
#include "loops.h"
}  // namespace vnni
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#elif defined(__ARM_NEON)
#ifdef __ARM_FEATURE_DOTPROD
#define PILON_DOT 1
#else
#define PILON_DOT 0
#endif
namespace neon {
#include "isa_neon.h"
#include "loops.h"
}  // namespace neon
#if defined(__linux__) && !PILON_DOT  // most have it, but compilers do not count on it
#undef PILON_DOT
#define PILON_DOT 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
namespace dotprod {
#include "isa_neon.h"
#include "loops.h"
}  // namespace dotprod
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#define PILON_DOT_AT_RUN_TIME 1
#endif
#endif

struct Named { const char* name; const Table* table; };

// The instruction sets this machine has, best first.
const std::vector<Named>& isas() {
  static const std::vector<Named> all = [] {
    std::vector<Named> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      found.push_back({"vnni", &vnni::table});
    if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", &avx2::table});
#elif defined(__ARM_NEON)
#ifdef PILON_DOT_AT_RUN_TIME
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back({"dotprod", &dotprod::table});
#endif
    found.push_back({"neon", &neon::table});
#endif
    found.push_back({"portable", &portable::table});
    return found;
  }();
  return all;
}

// The instruction set in use: the best, or the one that PILON_ISA names.
const Named& isa() {
  static const Named chosen = [] {
    const char* wanted = std::getenv("PILON_ISA");
    if (!wanted || !*wanted) return isas()[0];
    for (const Named& one : isas())
      if (!std::strcmp(one.name, wanted)) return one;
    STD_TORCH_CHECK(false, "PILON_ISA=", wanted, " is not an instruction set of this machine");
    return isas()[0];
  }();
  return chosen;
}

struct Team {
  int64_t rank = 0, size = 1;
  void wait() const {
#ifdef _OPENMP
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
  // This member's share of n things that are dealt out `unit` at a time.
  int64_t begin(int64_t n, int64_t unit = 1) const { return std::min(n, (n + unit - 1) / unit * rank / size * unit); }
  int64_t end(int64_t n, int64_t unit = 1) const { return Team{rank + 1, size}.begin(n, unit); }
};

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

int threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : int(torch::stable::get_num_threads());
#else
  return 1;
#endif
}

// All tokens, CHUNK at a time: a team on each chunk, or, where there are enough chunks, one thread on each.
template <class Work>
void in_chunks(const Work& work, const float* x, int64_t d_in, float* y, int64_t d_out, int64_t tokens) {
  const int64_t chunks = (tokens + CHUNK - 1) / CHUNK;
  const int size = threads();
  const auto chunk = [&](int64_t c) {
    const int64_t done = c * CHUNK, count = std::min(CHUNK, tokens - done);
    run(work, x + done * d_in, y + done * d_out, count, Team{}, room(work, count));
  };
  if (size == 1) {  // OpenMP makes a team even of one
    for (int64_t c = 0; c < chunks; c++) chunk(c);
    return;
  }
  if (chunks >= size) {
#pragma omp parallel for num_threads(size)
    for (int64_t c = 0; c < chunks; c++) chunk(c);
    return;
  }
  Buffers& shared = room(work, std::min(CHUNK, tokens));
#pragma omp parallel num_threads(size)
  {
    Team team;
#ifdef _OPENMP
    team = Team{omp_get_thread_num(), omp_get_num_threads()};
#endif
    for (int64_t done = 0; done < tokens; done += CHUNK) {
      run(work, x + done * d_in, y + done * d_out, std::min(CHUNK, tokens - done), team, shared);
      team.wait();
    }
  }
}

#include "operators.h"

}  // namespace
