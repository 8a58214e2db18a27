// See layer.h.
#include "target.h"

#include "layer.h"

#include <omp.h>

#include <algorithm>
#include <new>

#include "backend.h"

namespace fusedrnn {

namespace {

int64_t storage_needed(const Tensor& t) {
  int64_t last = t.storage_offset() + 1;
  const Sizes sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return last * t.element_bytes();
}

constexpr int64_t kMost = int64_t{1} << 40;  // beyond all memory; no product of sizes overflows below it

bool few_enough(const Tensor& x) {
  double elements = 1;
  for (const int64_t size : x.sizes()) elements *= static_cast<double>(std::max<int64_t>(size, 1));
  return elements < kMost;
}

}  // namespace

std::optional<WeightOrder> WeightOrder::of(const CellConstants& cell, int64_t weights, int64_t directions) {
  const int64_t each = directions > 0 ? weights / directions : 0;
  if (each < 2 || each > 5 || each * directions != weights) return std::nullopt;
  const bool parameters = cell.parameters > 0, product = cell.first > 0, odd = each % 2 == 1;
  const bool of_units = parameters && product;  // a weight of their own
  if (of_units && !odd) return std::nullopt;
  return WeightOrder{each, each >= 4, odd && !of_units, parameters, product};
}

ListedWeights WeightOrder::at(const Tensor* weights, int64_t direction) const {
  const Tensor *const w = weights + direction * each, *const last = w + each - 1;
  const Tensor* const of_units = !parameters ? nullptr : product ? last : w + 1;
  return {w,
          product ? w + 1 : nullptr,
          biases ? w + 2 : nullptr,
          biases ? w + 3 : nullptr,
          projected ? last : nullptr,
          of_units};
}

Matrices matrices_of(const std::optional<Tensors>& scales) {
  if (!scales) return Matrices::kAsInput;
  return scales->empty() ? Matrices::kBFloat16 : Matrices::kInt8;
}

Elements elements_of_weight(const Tensor& x, Sizes shape, Matrices matrices) {
  if (shape.size() != 2 || matrices == Matrices::kAsInput) return x.elements();
  return matrices == Matrices::kInt8 ? Elements(aoti_torch_dtype_int8()) : Elements(DType::kBFloat16);
}

DirectionScales WeightOrder::scales_at(const Tensor* all, int64_t direction) const {
  const Tensor* const s = all + direction * scales();
  return {s[0], s[1], projected ? s[2] : Tensor()};
}

Tensor aligned(const Tensor& t) { return is_aligned(t) ? t : t.copy(); }

Tensor widened_to_float(const Tensor& t) { return t.to(DType::kFloat32); }

bool is_there(const Tensor& t) {
  return t.numel() == 0 || (t.storage_bytes() >= storage_needed(t) && t.data() != nullptr);
}

bool steps_fit(const Tensor& x) { return (x.dim() < 3 || x.size(0) > 0) && few_enough(x); }

void check_there(const Tensor& t, const char* name) {
  check(t.defined(), name, " must be a tensor, got None");
  check(t.is_dense(), name, " must be a dense tensor, got a sparse one");
  check(is_there(t), name, ", of shape ", t.sizes(), ", needs a storage of ", storage_needed(t), " bytes, got one of ",
        t.storage_bytes(), ": it was resized or freed");
}

void check_tensor(const Tensor& t, const Tensor& x, const char* name, Sizes shape) {
  check_tensor(t, x, name, shape, x.elements());
}

void check_tensor(const Tensor& t, const Tensor& x, const char* name, Sizes shape, Elements elements) {
  check_there(t, name);
  check(t.device() == x.device(), name, " must be on the device of the input, ", x.device(), ", got ", t.device());
  check(t.elements() == elements, name, " must have the dtype ", elements == x.elements() ? "of the input, " : "",
        elements, ", got ", t.elements());
  check(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

Tensor check_optional(const OptionalTensor& t, const Tensor& x, const char* name, Sizes shape) {
  if (!t.has_value() || !t->defined()) return {};
  check_tensor(*t, x, name, shape);
  return aligned(t->contiguous());
}

void check_memory(bool enough) { check(enough, "fusedrnn: not enough memory for the layer's working space"); }

namespace {

// The steps of a batch: given by batch_sizes, or T steps of B samples.
void read_steps(Layer& layer, const OptionalTensor& batch_sizes) {
  LayerSizes& z = layer.size;
  layer.packed = batch_sizes.has_value() && batch_sizes->defined();
  if (layer.packed) {
    const Tensor& sizes = *batch_sizes;
    check(layer.x.dim() == 2, "input with batch_sizes must have 2 dimensions, got ", layer.x.dim());
    check(sizes.device().is_cpu() && sizes.elements() == aoti_torch_dtype_int64() && sizes.dim() == 1,
          "batch_sizes must be a 1-D int64 tensor on the CPU, got ", sizes.dim(), "-D ", sizes.elements(), " on ",
          sizes.device());
    check_there(sizes, "batch_sizes");
    z.T = sizes.size(0);
  } else {
    check(layer.x.dim() == 3, "input must have 3 dimensions, got ", layer.x.dim());
    z.T = layer.x.size(0);
  }
  check(z.T > 0, "Expected sequence length to be larger than 0 in RNN");
  check(z.T < kMost && few_enough(layer.x), "input of sizes ", layer.x.sizes(), " in ", z.T,
        " steps is larger than any memory: can't allocate memory");
  layer.steps.reset(new (std::nothrow) int64_t[2 * z.T]);
  check(layer.steps != nullptr, "can't allocate memory for ", z.T, " steps");
  int64_t* const active = layer.steps.get();
  int64_t* const offset = active + z.T;
  if (layer.packed) {
    const Tensor values = batch_sizes->contiguous();
    std::copy_n(static_cast<const int64_t*>(values.data()), z.T, active);
  } else {
    std::fill_n(active, z.T, layer.x.size(1));
  }
  z.N = 0;
  for (int64_t t = 0; t < z.T; ++t) {
    const int64_t rows = active[t];
    check(!layer.packed || (rows > 0 && (t == 0 || rows <= active[t - 1])),
          "batch_sizes must be positive and not increase, got ", rows, " at step ", t);
    check(!layer.packed || rows <= layer.x.size(0) - z.N, "batch_sizes must add up to the rows of the input, ",
          layer.x.size(0), ", got more by step ", t);
    offset[t] = z.N;
    z.N += rows;
  }
  check(!layer.packed || z.N == layer.x.size(0), "batch_sizes must add up to the rows of the input, ", layer.x.size(0),
        ", got ", z.N);
  z.B = active[0];
  z.active = active;
  z.offset = offset;
}

void read_weights(Layer& layer, const Tensors& weights, const std::optional<Tensors>& scales, int directions) {
  const CellConstants& cell = layer.constants();
  const auto order = WeightOrder::of(cell, weights.size(), directions);
  const char* const last = cell.projectable ? "[, w_hr]" : cell.parameters > 0 && cell.first > 0 ? ", w_unit" : "";
  check(order.has_value(), "weights must hold w_ih, w_hh[, b_ih, b_hh]", last, " for each of ", directions,
        " direction(s), got ", weights.size(), " tensors");
  LayerSizes& z = layer.size;
  z.D = directions;
  z.projected = order->projected;
  z.I = layer.x.size(-1);
  check(!z.projected || cell.projectable, "cell ", cell.name, " cannot be projected: w_hr given");
  const Tensor& w_hh = weights[1];  // [G*H, R], or [U*H] without a product
  const int64_t blocks = order->product ? cell.gates : cell.parameters;
  check_there(w_hh, "w_hh");
  check(w_hh.dim() == (order->product ? 2 : 1) && w_hh.size(0) % blocks == 0 && w_hh.size(0) > 0,
        "w_hh must have shape [", blocks, order->product ? "*H, H], got " : "*H], got ", w_hh.sizes());
  z.H = w_hh.size(0) / blocks;
  z.R = z.projected ? w_hh.size(1) : z.H;
  layer.matrices = matrices_of(scales);
  check(layer.matrices == Matrices::kAsInput || has_small_weights(layer.cell), "cell ", cell.name,
        " has no kernels for matrices in int8 or bfloat16");
  const auto contiguous = [](const Tensor* t) { return t ? aligned(t->contiguous()) : Tensor(); };
  for (int d = 0; d < directions; ++d) {
    const ListedWeights w = order->at(weights.data(), d);
    each_weight(w, cell, z.I, z.H, z.R, [&](const char* name, const Tensor& t, Sizes shape) {
      check_tensor(t, layer.x, name, shape, elements_of_weight(layer.x, shape, layer.matrices));
    });
    layer.weights.push_back(w.map(contiguous));
  }
  if (layer.matrices == Matrices::kAsInput) return;
  check(backend_of(layer.x).small_weights,
        "this device has no kernels for weights of another type than the input, got ", "an input on ",
        layer.x.device());
  check(layer.dtype == DType::kFloat32, "a layer with int8 or bfloat16 weights alone takes an input of torch.float32, ",
        "got ", layer.x.elements());
  if (layer.matrices != Matrices::kInt8) return;
  check(std::max({z.I, z.H, z.R}) <= kMostBytes, "rows of int8 weights must have at most ", kMostBytes,
        " elements, got I = ", z.I, ", H = ", z.H);
  check(static_cast<int64_t>(scales->size()) == order->scales() * directions,
        "scales must hold s_ih, s_hh[, s_hr] for ", "each of ", directions, " direction(s), got ", scales->size(),
        " tensors");
  for (int d = 0; d < directions; ++d) {
    const DirectionScales s = order->scales_at(scales->data(), d);
    each_scale(s, cell.gates, z.H, z.R,
               [&](const char* name, const Tensor& t, Sizes shape) { check_tensor(t, layer.x, name, shape); });
    layer.scales.push_back({contiguous(&s.ih), contiguous(&s.hh), z.projected ? contiguous(&s.hr) : Tensor()});
  }
}

}  // namespace

Layer read_layer(const LayerArguments& given) {
  const Tensor& x = given.x;
  check_there(x, "input");
  Layer layer;
  layer.cell = find_cell(given.cell);
  check(layer.cell >= 0, "unknown cell '", given.cell,
        "': if it is one of your own (fusedrnn.cell), import the module that ",
        "makes it, and make one layer of it, before a program that has it runs");
  const int dtype = x.elements().kernel_dtype();
  check(dtype >= 0, "fusedrnn supports float32, float64, bfloat16 and float16, got ", x.elements());
  layer.dtype = static_cast<DType>(dtype);
  layer.x = aligned(x.dim() > 0 && x.stride(-1) == 1 ? x : x.contiguous());
  read_steps(layer, given.batch_sizes);
  const int directions = given.bidirectional ? 2 : 1;
  read_weights(layer, given.weights, given.scales, directions);
  const LayerSizes& z = layer.size;
  if (backend_of(x).even_rows && !has_even_rows(rows(layer.x, layer.packed), z)) {
    layer.x = layer.x.contiguous();
  }
  layer.h0 = check_optional(given.h0, x, "h0", {directions, z.B, z.R});
  const int beside = layer.constants().beside();
  layer.c0 = check_optional(given.c0, x, "c0", {directions, z.B, std::max(beside, 1) * z.H});
  check(beside > 0 || !layer.c0.defined(), "cell ", layer.constants().name, " has no c0");
  check(layer.matrices == Matrices::kAsInput || !given.noise.mask_h || !given.noise.mask_h->defined(),
        "a layer with int8 or bfloat16 weights alone has no mask_h, which is for training");
  layer.mask_h = check_optional(given.noise.mask_h, x, "mask_h", {directions, z.B, z.R});
  layer.keep_h = check_rows(given.noise.keep_h, layer, "keep_h", z.R);
  layer.keep_c = check_rows(given.noise.keep_c, layer, "keep_c", z.H);
  check(beside > 0 || !layer.keep_c.defined(), "cell ", layer.constants().name, " has no c");
  check(beside < 2 || !layer.keep_c.defined(), "cell ", layer.constants().name,
        " has no zoneout but of h: keep_c given");
  return layer;
}

Tensor check_rows(const OptionalTensor& t, const Layer& layer, const char* name, int64_t columns) {
  if (!t.has_value() || !t->defined()) return {};
  const LayerSizes& z = layer.size;
  const std::vector<int64_t> sizes =
      layer.packed ? std::vector<int64_t>{z.N, z.D * columns} : std::vector<int64_t>{z.T, z.B, z.D * columns};
  check_tensor(*t, layer.x, name, sizes);
  return aligned(t->stride(-1) != 1 && t->size(-1) != 1 ? t->contiguous() : *t);
}

void Layer::widen_without_kernel() {
  if (backend_of(x).has(cell, kernel_dtype())) return;
  dtype = DType::kFloat32;
  const auto widened = [](const Tensor& t) { return t.defined() ? widened_to_float(t) : t; };
  for (Tensor* t : {&x, &h0, &c0, &mask_h, &keep_h, &keep_c}) *t = widened(*t);
  for (DirectionWeights& w : weights) w = w.map(widened);
}

const void* input(const Tensor& t) { return t.defined() ? t.data() : nullptr; }

WeightScales scales_of(const DirectionScales& scales) {
  const auto values = [](const Tensor& t) { return static_cast<const float*>(input(t)); };
  return {values(scales.ih), values(scales.hh), values(scales.hr)};
}

void* output(const Tensor& t, std::initializer_list<int64_t> shape, int64_t part, int64_t parts) {
  if (!t.defined() || t.numel() == 0) return nullptr;
  const Sizes one(shape), whole = t.sizes();
  const bool fits = whole.size() == one.size() && whole[0] == parts * one[0] && whole.from(1) == one.from(1) &&
                    t.is_contiguous() && 0 <= part && part < parts;
  check(fits, "fusedrnn: a result of shape ", whole, ", for ", parts, " parts of shape ", one);
  return static_cast<char*>(t.mutable_data()) + part * (t.nbytes() / parts);
}

RowView rows(const Tensor& t, bool packed) {
  if (!t.defined()) return {nullptr, 0, 0};
  return packed ? RowView{t.data(), -1, t.stride(0)} : RowView{t.data(), t.stride(0), t.stride(1)};
}

int threads() {
  if (omp_in_parallel() || forked()) return 1;
  uint32_t threads = 1;
  done(torch_get_num_threads(&threads), "fusedrnn: torch does not tell its number of threads");
  return static_cast<int>(threads);
}

}  // namespace fusedrnn
