// The torch operators: check the tensors and describe them as projections. Part of products.cpp.

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

// The tensors of a projection, in the order of cpu_layout.CpuProjection.tensors().
enum Part : size_t { A, B, SELECTED, SCALE, SHIFT, BIAS, PARTS };
using Parts = std::vector<Maybe>;

// A (n, latent tiles, d_in blocks, 32) and B (n, d_out tiles, rank blocks, 32) of a bank, of which `selected` are used;
// or A (1, d_out tiles, d_in blocks, 32) of a matrix, without B.
void describe(Projection& p, int64_t d_in, const Parts& parts, int64_t d_out, int64_t group) {
  STD_TORCH_CHECK(parts.size() == PARTS && parts[A] && parts[SCALE], "a projection has ", int(PARTS), " parts");
  const Tensor &tiles_A = *parts[A], &scale = *parts[SCALE];
  expect(tiles_A, ScalarType::Byte, "A");
  const int64_t n = tiles_A.size(0), tiles = tiles_A.size(1), blocks = tiles_A.size(2);
  STD_TORCH_CHECK(tiles_A.dim() == 4 && tiles_A.size(3) == BYTES && blocks == up_to(d_in, BLOCK) / BLOCK,
                  "A does not fit x");
  STD_TORCH_CHECK(group >= 0 && group % TILE == 0, "group must be a multiple of ", TILE);
  p.A = static_cast<const uint8_t*>(tiles_A.data_ptr()), p.B = nullptr;
  p.d_in = d_in, p.d_out = d_out, p.latent = 0, p.group = group < d_in ? group : 0;
  const int64_t segments = p.group ? (d_in + p.group - 1) / p.group : 1, out_tiles = p.d_out_tiles();
  p.offsets.resize(segments);
  for (int64_t i = 0; i < segments; i++) p.offsets[i] = i * (p.group / BLOCK) * BYTES;
  p.bias = floats(parts[BIAS], d_out, "bias");
  if (!parts[B]) {
    STD_TORCH_CHECK(n == 1 && tiles == out_tiles, "A must be one matrix of d_out outputs");
    p.scale = floats(scale, d_out, "scale"), p.shift = nullptr;
    p.starts.resize(tiles);
    for (int64_t t = 0; t < tiles; t++) p.starts[t] = t * blocks * BYTES;
    return;
  }
  const Tensor& tiles_B = *parts[B];
  expect(tiles_B, ScalarType::Byte, "B");
  STD_TORCH_CHECK(bool(parts[SELECTED]), "a bank needs `selected`");
  const Tensor& selected = *parts[SELECTED];
  expect(selected, ScalarType::Long, "selected");
  const int64_t k = selected.numel(), rank_blocks = tiles * TILE / BLOCK;
  STD_TORCH_CHECK(tiles_B.dim() == 4 && tiles_B.size(0) == n && tiles_B.size(1) == out_tiles &&
                  tiles_B.size(2) == rank_blocks && tiles_B.size(3) == BYTES, "B does not fit A and d_out");
  p.B = static_cast<const uint8_t*>(tiles_B.data_ptr());
  p.latent = k * tiles * TILE, p.rank_blocks = rank_blocks;
  p.scale = floats(scale, p.latent, "scale"), p.shift = floats(parts[SHIFT], p.latent, "shift");
  p.starts.resize(k * tiles), p.B_offsets.resize(k), p.B_starts.resize(out_tiles);
  const int64_t* index = static_cast<const int64_t*>(selected.data_ptr());
  for (int64_t i = 0; i < k; i++) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < n, "selected names primitive ", index[i], " of ", n);
    for (int64_t t = 0; t < tiles; t++) p.starts[i * tiles + t] = (index[i] * tiles + t) * blocks * BYTES;
    p.B_offsets[i] = index[i] * out_tiles * rank_blocks * BYTES;
  }
  for (int64_t t = 0; t < out_tiles; t++) p.B_starts[t] = t * rank_blocks * BYTES;
}

// A block: down(act(up(x))), or with a gate down(act(gate(x)) * up(x)).
struct Sizes {
  int64_t d_in, hidden, d_out, group, down_group, activation;
};
void describe(Ffn& f, const Parts& up, const Parts& gate, const Parts& down, const Sizes& sizes) {
  f.gated = !gate.empty(), f.activation = sizes.activation;
  describe(f.up, sizes.d_in, up, sizes.hidden, sizes.group);
  if (f.gated) describe(f.gate, sizes.d_in, gate, sizes.hidden, sizes.group);
  describe(f.down, sizes.hidden, down, sizes.d_out, sizes.down_group);
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

Tensor op_project(const Tensor& x, const Parts& parts, int64_t d_out, int64_t group) {
  const Rows io = rows(x, d_out);
  describe(one, io.d_in, parts, d_out, group);
  return computed(one, io, d_out);
}

Tensor op_ffn(const Tensor& x, const Parts& up, const Parts& gate, const Parts& down, int64_t hidden, int64_t d_out,
              int64_t group, int64_t down_group, int64_t activation) {
  const Rows io = rows(x, d_out);
  describe(three, up, gate, down, {io.d_in, hidden, d_out, group, down_group, activation});
  return computed(three, io, d_out);
}

// A description to run many times: passing two dozen tensors takes as long as computing a small projection.
struct Prepared {
  std::variant<Projection, Ffn, IntegerMatrix, IntegerBank> work;
  int64_t d_in, d_out;
  std::vector<Parts> kept;  // the memory that `work` points to
};
std::mutex guard;
std::unordered_map<int64_t, std::shared_ptr<const Prepared>> prepared_works;

int64_t keep(std::shared_ptr<const Prepared> work) {
  static int64_t number = 0;  // never given twice, so that a forgotten one stays unknown
  const std::lock_guard lock(guard);
  prepared_works[++number] = std::move(work);
  return number;
}

int64_t op_prepare_project(const Parts& parts, int64_t d_in, int64_t d_out, int64_t group) {
  Projection p;
  describe(p, d_in, parts, d_out, group);
  return keep(std::make_shared<Prepared>(Prepared{std::move(p), d_in, d_out, {parts}}));
}

int64_t op_prepare_ffn(const Parts& up, const Parts& gate, const Parts& down, int64_t d_in, int64_t hidden,
                       int64_t d_out, int64_t group, int64_t down_group, int64_t activation) {
  Ffn f;
  describe(f, up, gate, down, {d_in, hidden, d_out, group, down_group, activation});
  return keep(std::make_shared<Prepared>(Prepared{std::move(f), d_in, d_out, {up, gate, down}}));
}

Tensor op_run(const Tensor& x, int64_t number) {
  std::shared_ptr<const Prepared> prepared;  // held while it runs: another thread may forget it
  {
    const std::lock_guard lock(guard);
    const auto found = prepared_works.find(number);
    STD_TORCH_CHECK(found != prepared_works.end(), "nothing is prepared under number ", number);
    prepared = found->second;
  }
  const Rows io = rows(x, prepared->d_out);
  STD_TORCH_CHECK(io.d_in == prepared->d_in, "x has ", io.d_in, " columns instead of ", prepared->d_in);
  return std::visit([&](const auto& work) { return computed(work, io, prepared->d_out); }, prepared->work);
}

void op_forget(int64_t number) {
  const std::lock_guard lock(guard);
  prepared_works.erase(number);
}

// The name of the instruction set in use, then of all that this machine has.
std::string op_isa() {
  std::string names = isa().name;
  for (const Named& one : isas()) names += std::string(" ") + one.name;
  return names;
}
