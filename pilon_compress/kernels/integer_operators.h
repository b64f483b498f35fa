// The torch operators of integer codes. Part of products.cpp.

const int32_t* words_of(const Tensor& tensor, const char* name) {
  expect(tensor, ScalarType::Int, name);
  STD_TORCH_CHECK(tensor.dim() == 5 && tensor.size(4) == TILE, name, " must be (n, tiles, groups, words, ", int(TILE), ")");
  return static_cast<const int32_t*>(tensor.data_ptr());
}
const uint16_t* scales_of(const Tensor& tensor, int64_t n, const char* name) {
  expect(tensor, ScalarType::BFloat16, name);
  STD_TORCH_CHECK(tensor.numel() == n, name, " has ", tensor.numel(), " scales instead of ", n);
  return static_cast<const uint16_t*>(tensor.data_ptr());
}

// `words` (1, tiles, groups, words, 16) with scales (1, tiles, groups, 16) of a matrix; or (n, ...) of a bank's A, of
// which `selected` primitives stand side by side.
void describe(IntegerMatrix& p, const Tensor& words, const Tensor& scales, int64_t d_in, int64_t bits, int64_t group,
              const std::vector<int64_t>& selected) {
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "no integers of ", bits, " bits");
  p.words = words_of(words, "words");
  const int64_t n = words.size(0), tiles = words.size(1);
  p.d_in = d_in, p.bits = bits, p.groups = words.size(2), p.length = words.size(3);
  p.group = group > 0 && group < d_in ? group : d_in;
  STD_TORCH_CHECK(p.groups == up_to(d_in, p.group) / p.group && p.length == up_to(p.group, p.fields()) / p.fields(),
                  "words do not fit x");
  p.scales = scales_of(scales, n * tiles * p.groups * TILE, "scales");
  p.starts.clear(), p.scale_starts.clear(), p.offsets.clear();
  for (int64_t i : selected) {
    STD_TORCH_CHECK(i >= 0 && i < n, "selected names primitive ", i, " of ", n);
    for (int64_t t = 0; t < tiles; t++) {
      p.starts.push_back((i * tiles + t) * p.groups * p.length * TILE);
      p.scale_starts.push_back((i * tiles + t) * p.groups * TILE);
    }
  }
  for (int64_t g = 0; g < p.groups; g++) p.offsets.push_back(g * p.length * TILE);
  p.d_out = int64_t(p.starts.size()) * TILE;
}

IntegerMatrix integer_matrix(const Tensor& words, const Tensor& scales, const Maybe& bias, int64_t d_in, int64_t d_out,
                             int64_t bits, int64_t group) {
  IntegerMatrix p;
  describe(p, words, scales, d_in, bits, group, {0});
  STD_TORCH_CHECK(words.size(0) == 1 && p.d_out == up_to(d_out, TILE), "words are not those of ", d_out, " outputs");
  p.d_out = d_out, p.bias = floats(bias, d_out, "bias");
  return p;
}

IntegerMatrix int8_matrix(const Tensor& words, const Tensor& sums, const Tensor& scale, const Maybe& bias, int64_t d_in,
                          int64_t d_out) {
  IntegerMatrix p;
  p.words = words_of(words, "words"), p.d_in = d_in, p.d_out = d_out, p.bits = 8, p.length = words.size(3);
  STD_TORCH_CHECK(words.size(0) == 1 && words.size(2) == 1 && words.size(1) == p.tiles() && p.length == up_to(d_in, 4) / 4,
                  "words do not fit x and d_out");
  expect(sums, ScalarType::Int, "sums");
  STD_TORCH_CHECK(sums.numel() == p.tiles() * TILE, "sums do not fit d_out");
  p.sums = static_cast<const int32_t*>(sums.data_ptr());
  p.scale = floats(scale, d_out, "scale"), p.bias = floats(bias, d_out, "bias");
  return p;
}

// A (n, tiles, groups, words, 16) with scales (n, tiles, groups, 16); B (n, tiles, 1, words, 16) with scales
// (n, groups of outputs, rank); `selected` (k,), `weight` (k, components of A's tiles).
IntegerBank integer_bank(const Tensor& A, const Tensor& A_scales, const Tensor& B, const Tensor& B_scales,
                         const Tensor& selected, const Tensor& weight, int64_t d_in, int64_t d_out, int64_t bits,
                         int64_t group) {
  IntegerBank p;
  expect(selected, ScalarType::Long, "selected");
  const int64_t* index = static_cast<const int64_t*>(selected.data_ptr());
  p.selected.assign(index, index + selected.numel());
  describe(p.A, A, A_scales, d_in, bits, group, p.selected);
  STD_TORCH_CHECK(B_scales.dim() == 3 && B_scales.size(0) == A.size(0), "B's scales must be (n, groups, rank)");
  p.d_in = d_in, p.d_out = d_out, p.k = selected.numel(), p.B_groups = B_scales.size(1), p.rank = B_scales.size(2);
  p.B = words_of(B, "B"), p.B_length = B.size(3);
  p.B_scales = scales_of(B_scales, B_scales.numel(), "B's scales");
  STD_TORCH_CHECK(B.size(0) == A.size(0) && B.size(1) == p.tiles() && B.size(2) == 1 && A.size(1) == up_to(p.rank, TILE) / TILE &&
                  p.B_length == up_to(p.rank, p.A.fields()) / p.A.fields(), "B does not fit A and d_out");
  STD_TORCH_CHECK(p.B_groups == 1 || (group % TILE == 0 && p.B_groups == up_to(d_out, group) / group),
                  "groups of outputs must be complete tiles");
  p.group_tiles = p.B_groups == 1 ? p.tiles() : group / TILE;
  p.weight = floats(weight, p.A.d_out, "weight");
  for (int64_t t = 0; t < p.tiles(); t++) p.starts.push_back(t * p.B_length * TILE);
  for (int64_t i : p.selected) p.offsets.push_back(i * p.tiles() * p.B_length * TILE);
  return p;
}

Tensor op_integer_linear(const Tensor& x, const Tensor& words, const Tensor& scales, const Maybe& bias, int64_t d_out,
                         int64_t bits, int64_t group) {
  const Rows io = rows(x, d_out);
  return computed(integer_matrix(words, scales, bias, io.d_in, d_out, bits, group), io, d_out);
}
Tensor op_int8_linear(const Tensor& x, const Tensor& words, const Tensor& sums, const Tensor& scale, const Maybe& bias,
                      int64_t d_out) {
  const Rows io = rows(x, d_out);
  return computed(int8_matrix(words, sums, scale, bias, io.d_in, d_out), io, d_out);
}
Tensor op_integer_compose(const Tensor& x, const Tensor& A, const Tensor& A_scales, const Tensor& B, const Tensor& B_scales,
                          const Tensor& selected, const Tensor& weight, int64_t d_out, int64_t bits, int64_t group) {
  const Rows io = rows(x, d_out);
  return computed(integer_bank(A, A_scales, B, B_scales, selected, weight, io.d_in, d_out, bits, group), io, d_out);
}

int64_t op_prepare_integer_linear(const Tensor& words, const Tensor& scales, const Maybe& bias, int64_t d_in, int64_t d_out,
                                  int64_t bits, int64_t group) {
  return keep(std::make_shared<Prepared>(
      Prepared{integer_matrix(words, scales, bias, d_in, d_out, bits, group), d_in, d_out, {{words, scales, bias}}}));
}
int64_t op_prepare_int8_linear(const Tensor& words, const Tensor& sums, const Tensor& scale, const Maybe& bias, int64_t d_in,
                               int64_t d_out) {
  return keep(std::make_shared<Prepared>(
      Prepared{int8_matrix(words, sums, scale, bias, d_in, d_out), d_in, d_out, {{words, sums, scale, bias}}}));
}
int64_t op_prepare_integer_compose(const Tensor& A, const Tensor& A_scales, const Tensor& B, const Tensor& B_scales,
                                   const Tensor& selected, const Tensor& weight, int64_t d_in, int64_t d_out, int64_t bits,
                                   int64_t group) {
  return keep(std::make_shared<Prepared>(Prepared{
      integer_bank(A, A_scales, B, B_scales, selected, weight, d_in, d_out, bits, group), d_in, d_out,
      {{A, A_scales, B, B_scales, selected, weight}}}));
}
