// Products with ternary and integer weights on the CPU: operators on torch's stable ABI, so that one library serves every
// Python. A ternary projection:
//
//   x --quantise--> (q, s) --A--> u = int·s·scale + shift --quantise--> (q', s') --B--> y = int·s' + bias
//
// `int` are exact integer sums, and every float32 operation stands in the order of reference.py, without fused
// multiply-adds (-ffp-contract=off): the results are equal bit for bit, on every instruction set.
//
// Integers of 8, 4, 3 and 2 bits multiply float32 activations as they are (integer_loops.h), with fused multiply-adds where
// a CPU has them: equal for any number of tokens and threads, and between instruction sets but for the last bits.
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

// Integer codes in words of 32 bits: a word holds the codes of as many consecutive inputs of one output as fit.
template <int BITS>
constexpr int FIELDS = 32 / BITS;
constexpr int64_t AHEAD = 4096;  // bytes that are fetched beforehand from a stream of words

// A product of floats and codes. A tile's words lie in runs: one for each group of inputs that share a scale, or one
// for each selected primitive, whose scales are in x already.
struct IntegerJob {
  int64_t bits;
  const int32_t* words;
  const uint16_t* scales;                          // bfloat16, 16 for each run of a tile; or null
  const int64_t *starts, *scale_starts, *offsets;  // words: of each tile, and of each run from there
  int64_t runs, length, last;                      // words of a run, and of the last one
  const float* x;
  int64_t x_stride, x_step;                        // floats from token to token, and from run to run
  int64_t x_group, x_tiles;                        // floats to the inputs of the next `x_tiles` tiles
  int64_t tokens;
  float* out;
  int64_t stride, width;                           // of `out`: floats from token to token, and those that exist
  const float *multiply, *add;                     // by output, or null
};

// A product of 8-bit activations and 8-bit weights.
struct Int8Job {
  const int32_t *words, *sums;                     // sums of an output's weights
  int64_t length;                                  // words of a tile
  const Codes* in;
  int64_t tokens;
  float* out;
  int64_t stride, width;
  const float *scale, *add;                        // by output; add or null
};

enum Activation : int64_t { RELU = 0, RELU2 = 1 };

// The functions of one instruction set.
struct Table {
  void (*quantise)(const float* x, int64_t d, int64_t token, int64_t first_group, int64_t groups, Codes& codes);
  void (*tiles)(const Job& job, int64_t begin, int64_t end);
  void (*activate)(float* h, const float* gate, int64_t n, int64_t activation);
  void (*integers)(const IntegerJob& job, int64_t begin, int64_t end);
  void (*int8)(const Int8Job& job, int64_t begin, int64_t end);
};

#define UNROLL _Pragma("GCC unroll 16")

namespace portable {
#include "isa_portable.h"
#include "loops.h"
#include "integer_loops.h"
}  // namespace portable

#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "isa_avx2.h"
#include "loops.h"
#include "integer_loops.h"
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
#include "integer_loops.h"
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
#include "integer_loops.h"
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
#include "integer_loops.h"
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
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", &avx2::table});
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

int threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : int(torch::stable::get_num_threads());
#else
  return 1;
#endif
}

#include "projections.h"
#include "integers.h"
#include "chunks.h"
#include "operators.h"
#include "integer_operators.h"

STABLE_TORCH_LIBRARY(pilon, m) {
  m.def("project(Tensor x, Tensor?[] parts, int d_out, int group) -> Tensor");
  m.def("ffn(Tensor x, Tensor?[] up, Tensor?[] gate, Tensor?[] down, int hidden, int d_out, int group, int down_group, "
        "int activation) -> Tensor");
  m.def("prepare_project(Tensor?[] parts, int d_in, int d_out, int group) -> int");
  m.def("prepare_ffn(Tensor?[] up, Tensor?[] gate, Tensor?[] down, int d_in, int hidden, int d_out, int group, "
        "int down_group, int activation) -> int");
  m.def("run(Tensor x, int number) -> Tensor");
  m.def("forget(int number) -> ()");
  m.def("integer_linear(Tensor x, Tensor words, Tensor scales, Tensor? bias, int d_out, int bits, int group) -> Tensor");
  m.def("int8_linear(Tensor x, Tensor words, Tensor sums, Tensor scale, Tensor? bias, int d_out) -> Tensor");
  m.def("integer_compose(Tensor x, Tensor A, Tensor A_scales, Tensor B, Tensor B_scales, Tensor selected, Tensor weight, "
        "int d_out, int bits, int group) -> Tensor");
  m.def("prepare_integer_linear(Tensor words, Tensor scales, Tensor? bias, int d_in, int d_out, int bits, int group) -> int");
  m.def("prepare_int8_linear(Tensor words, Tensor sums, Tensor scale, Tensor? bias, int d_in, int d_out) -> int");
  m.def("prepare_integer_compose(Tensor A, Tensor A_scales, Tensor B, Tensor B_scales, Tensor selected, Tensor weight, "
        "int d_in, int d_out, int bits, int group) -> int");
  m.def("isa() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(pilon, CPU, m) {
  m.impl("project", TORCH_BOX(&op_project));
  m.impl("ffn", TORCH_BOX(&op_ffn));
  m.impl("prepare_project", TORCH_BOX(&op_prepare_project));
  m.impl("prepare_ffn", TORCH_BOX(&op_prepare_ffn));
  m.impl("run", TORCH_BOX(&op_run));
  m.impl("integer_linear", TORCH_BOX(&op_integer_linear));
  m.impl("int8_linear", TORCH_BOX(&op_int8_linear));
  m.impl("integer_compose", TORCH_BOX(&op_integer_compose));
  m.impl("prepare_integer_linear", TORCH_BOX(&op_prepare_integer_linear));
  m.impl("prepare_int8_linear", TORCH_BOX(&op_prepare_int8_linear));
  m.impl("prepare_integer_compose", TORCH_BOX(&op_prepare_integer_compose));
}
STABLE_TORCH_LIBRARY_IMPL(pilon, CompositeExplicitAutograd, m) {
  m.impl("forget", TORCH_BOX(&op_forget));
  m.impl("isa", TORCH_BOX(&op_isa));
}

}  // namespace
