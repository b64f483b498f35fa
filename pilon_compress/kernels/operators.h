// The operators: what torch hands over is checked and made into projections. Part of ternary.cpp.

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using torch::headeronly::ScalarType;

void expect(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type, name,
                  " must be a contiguous CPU tensor of the right type");
}
const float* floats(const Maybe& tensor, int64_t n, const char* name) {
  if (!tensor) return nullptr;
  expect(*tensor, ScalarType::Float, name);
  STD_TORCH_CHECK(tensor->numel() == n, name, " has ", tensor->numel(), " numbers instead of ", n);
  return static_cast<const float*>(tensor->data_ptr());
}

// A (n, latent tiles, d_in blocks, 32) and B (n, d_out tiles, rank blocks, 32) of a bank, of which `selected` are used;
// or A (1, d_out tiles, d_in blocks, 32) of a matrix, without B.
void describe(Projection& p, int64_t d_in, const Tensor& A, const Maybe& B, const Maybe& selected, const Tensor& scale,
              const Maybe& shift, const Maybe& bias, int64_t d_out, int64_t group) {
  expect(A, ScalarType::Byte, "A");
  const int64_t n = A.size(0), tiles = A.size(1), blocks = A.size(2);
  STD_TORCH_CHECK(A.dim() == 4 && A.size(3) == BYTES && blocks == up_to(d_in, BLOCK) / BLOCK, "A does not fit x");
  STD_TORCH_CHECK(group >= 0 && group % TILE == 0, "group must be a multiple of ", TILE);
  p.A = static_cast<const uint8_t*>(A.data_ptr()), p.B = nullptr;
  p.d_in = d_in, p.d_out = d_out, p.latent = 0, p.group = group < d_in ? group : 0;
  const int64_t segments = p.group ? (d_in + p.group - 1) / p.group : 1, out_tiles = p.d_out_tiles();
  p.offsets.resize(segments);
  for (int64_t i = 0; i < segments; i++) p.offsets[i] = i * (p.group / BLOCK) * BYTES;
  p.bias = floats(bias, d_out, "bias");
  if (!B) {
    STD_TORCH_CHECK(n == 1 && tiles == out_tiles, "A must be one matrix of d_out outputs");
    p.scale = floats(scale, d_out, "scale"), p.shift = nullptr;
    p.starts.resize(tiles);
    for (int64_t t = 0; t < tiles; t++) p.starts[t] = t * blocks * BYTES;
    return;
  }
  expect(*B, ScalarType::Byte, "B");
  STD_TORCH_CHECK(bool(selected), "a bank needs `selected`");
  expect(*selected, ScalarType::Long, "selected");
  const int64_t k = selected->numel(), rank_blocks = tiles * TILE / BLOCK;
  STD_TORCH_CHECK(B->dim() == 4 && B->size(0) == n && B->size(1) == out_tiles && B->size(2) == rank_blocks &&
                  B->size(3) == BYTES, "B does not fit A and d_out");
  p.B = static_cast<const uint8_t*>(B->data_ptr());
  p.latent = k * tiles * TILE, p.rank_blocks = rank_blocks;
  p.scale = floats(scale, p.latent, "scale"), p.shift = floats(shift, p.latent, "shift");
  p.starts.resize(k * tiles), p.B_offsets.resize(k), p.B_starts.resize(out_tiles);
  const int64_t* index = static_cast<const int64_t*>(selected->data_ptr());
  for (int64_t i = 0; i < k; i++) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < n, "selected names primitive ", index[i], " of ", n);
    for (int64_t t = 0; t < tiles; t++) p.starts[i * tiles + t] = (index[i] * tiles + t) * blocks * BYTES;
    p.B_offsets[i] = index[i] * out_tiles * rank_blocks * BYTES;
  }
  for (int64_t t = 0; t < out_tiles; t++) p.B_starts[t] = t * rank_blocks * BYTES;
}

struct Rows {  // x as (tokens, d_in), and an output to fill
  Tensor x, out;
  int64_t d_in, tokens;
};
Rows rows(const Tensor& x, int64_t d_out) {
  const int64_t d_in = x.size(-1);
  expect(x, ScalarType::Float, "x");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), strides(shape.size(), 1);
  shape.back() = d_out;
  for (size_t i = shape.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * shape[i];
  AtenTensorHandle out;  // half the cost of torch::stable::new_empty, which goes through the dispatcher
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(),
                                                         aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                         &out));
  return {x, Tensor(out), d_in, d_in ? x.numel() / d_in : 0};
}
template <class Work>
Tensor computed(const Work& work, const Rows& io, int64_t d_out) {
  in_chunks(work, static_cast<const float*>(io.x.data_ptr()), io.d_in, static_cast<float*>(io.out.data_ptr()), d_out,
            io.tokens);
  return io.out;
}

// Descriptions are kept from call to call only for their memory.
thread_local Projection one;
thread_local Ffn three;

Tensor op_project(const Tensor& x, const Tensor& A, const Maybe& B, const Maybe& selected, const Tensor& scale,
                  const Maybe& shift, const Maybe& bias, int64_t d_out, int64_t group) {
  const Rows io = rows(x, d_out);
  describe(one, io.d_in, A, B, selected, scale, shift, bias, d_out, group);
  return computed(one, io, d_out);
}

Tensor op_ffn(const Tensor& x, const Tensor& up_A, const Maybe& up_B, const Maybe& up_selected, const Tensor& up_scale,
              const Maybe& up_shift, const Maybe& up_bias, const Maybe& gate_A, const Maybe& gate_B,
              const Maybe& gate_selected, const Maybe& gate_scale, const Maybe& gate_shift, const Maybe& gate_bias,
              const Tensor& down_A, const Maybe& down_B, const Maybe& down_selected, const Tensor& down_scale,
              const Maybe& down_shift, const Maybe& down_bias, int64_t hidden, int64_t d_out, int64_t group,
              int64_t down_group, int64_t activation) {
  const Rows io = rows(x, d_out);
  Ffn& f = three;
  f.gated = bool(gate_A), f.activation = activation;
  describe(f.up, io.d_in, up_A, up_B, up_selected, up_scale, up_shift, up_bias, hidden, group);
  if (f.gated) {
    STD_TORCH_CHECK(bool(gate_scale), "a gate needs a scale");
    describe(f.gate, io.d_in, *gate_A, gate_B, gate_selected, *gate_scale, gate_shift, gate_bias, hidden, group);
  }
  describe(f.down, hidden, down_A, down_B, down_selected, down_scale, down_shift, down_bias, d_out, down_group);
  return computed(f, io, d_out);
}

Tensor op_int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const Maybe& bias) {
  expect(weight, ScalarType::Char, "weight");
  const int64_t d_out = weight.size(0), d = weight.size(1);
  const Rows io = rows(x, d_out);
  STD_TORCH_CHECK(d == io.d_in, "weight does not fit x");
  Codes& codes = own.x;
  quantise(static_cast<const float*>(x.data_ptr()), d, io.tokens, d, 0, codes);
  const Int8Job job = {static_cast<const int8_t*>(weight.data_ptr()), d, &codes, io.tokens,
                       static_cast<float*>(io.out.data_ptr()), d_out, floats(scale, d_out, "scale"),
                       floats(bias, d_out, "bias")};
  [[maybe_unused]] const int size = threads();
#pragma omp parallel num_threads(size) if (size > 1)
  {
    Team team;
#ifdef _OPENMP
    team = Team{omp_get_thread_num(), omp_get_num_threads()};
#endif
    isa().table->int8_rows(job, team.begin(d_out, 16), team.end(d_out, 16));
  }
  return io.out;
}

// The instruction set in use, then all that this machine has.
std::string op_isa() {
  std::string names = isa().name;
  for (const Named& one : isas()) names += std::string(" ") + one.name;
  return names;
}

STABLE_TORCH_LIBRARY(pilon, m) {
  m.def("project(Tensor x, Tensor A, Tensor? B, Tensor? selected, Tensor scale, Tensor? shift, Tensor? bias, int d_out, "
        "int group) -> Tensor");
  m.def("ffn(Tensor x, Tensor up_A, Tensor? up_B, Tensor? up_selected, Tensor up_scale, Tensor? up_shift, "
        "Tensor? up_bias, Tensor? gate_A, Tensor? gate_B, Tensor? gate_selected, Tensor? gate_scale, "
        "Tensor? gate_shift, Tensor? gate_bias, Tensor down_A, Tensor? down_B, Tensor? down_selected, "
        "Tensor down_scale, Tensor? down_shift, Tensor? down_bias, int hidden, int d_out, int group, int down_group, "
        "int activation) -> Tensor");
  m.def("int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  m.def("isa() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(pilon, CPU, m) {
  m.impl("project", TORCH_BOX(&op_project));
  m.impl("ffn", TORCH_BOX(&op_ffn));
  m.impl("int8_linear", TORCH_BOX(&op_int8_linear));
}
STABLE_TORCH_LIBRARY_IMPL(pilon, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&op_isa)); }
