// See layer.h.
#include "layer.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>

#include "backend.h"

namespace fusedrnn {

using at::Tensor;

namespace {

size_t storage_needed(const Tensor& t) {
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.dtype().itemsize(), t.storage_offset());
}

constexpr int64_t kMost = int64_t{1} << 40;  // beyond all memory; no product of sizes overflows below it

bool few_enough(const Tensor& x) {
  double elements = 1;
  for (const int64_t size : x.sizes()) elements *= static_cast<double>(std::max<int64_t>(size, 1));
  return elements < kMost;
}

}  // namespace

std::optional<WeightOrder> WeightOrder::of(int64_t weights, int64_t directions) {
  const int64_t each = directions > 0 ? weights / directions : 0;
  if (each < 2 || each > 5 || each * directions != weights) return std::nullopt;
  return WeightOrder{each, each >= 4, each % 2 == 1};
}

ListedWeights WeightOrder::at(at::TensorList weights, int64_t direction) const {
  const Tensor* const w = weights.data() + direction * each;
  return {w, w + 1, biases ? w + 2 : nullptr, biases ? w + 3 : nullptr, projected ? w + each - 1 : nullptr};
}

Tensor aligned(const Tensor& t) { return is_aligned(t) ? t : t.clone(); }

Tensor widened_to_float(const Tensor& t) { return t.to(at::kFloat, false, false, at::MemoryFormat::Contiguous); }

bool is_there(const Tensor& t) {
  const c10::Storage& storage = t.storage();
  return t.numel() == 0 || (storage.nbytes() >= storage_needed(t) && storage.data() != nullptr);
}

bool steps_fit(const Tensor& x) { return (x.dim() < 3 || x.size(0) > 0) && few_enough(x); }

void check_there(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(t.defined(), name, " must be a tensor, got None");
  TORCH_CHECK(t.has_storage(), name, " must be a dense tensor, got one with layout ", t.layout());
  TORCH_CHECK(is_there(t), name, ", of shape ", t.sizes(), ", needs a storage of ", storage_needed(t),
              " bytes, got one of ", t.storage().nbytes(), ": it was resized or freed");
}

void check_tensor(const Tensor& t, const Tensor& x, const char* name, at::IntArrayRef shape) {
  check_there(t, name);
  TORCH_CHECK(t.device() == x.device(), name, " must be on the device of the input, ", x.device(), ", got ",
              t.device());
  TORCH_CHECK_VALUE(t.scalar_type() == x.scalar_type(), name, " must have the dtype of the input, ", x.scalar_type(),
                    ", got ", t.scalar_type());
  TORCH_CHECK(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

Tensor check_optional(const OptionalTensor& t, const Tensor& x, const char* name, at::IntArrayRef shape) {
  if (!t.has_value() || !t->defined()) return {};
  check_tensor(*t, x, name, shape);
  return aligned(t->contiguous());
}

void check_memory(bool enough) {
  TORCH_CHECK_WITH(OutOfMemoryError, enough, "fusedrnn: not enough memory for the layer's working space");
}

namespace {

// The steps of a batch: given by batch_sizes, or T steps of B samples.
void read_steps(Layer& layer, const OptionalTensor& batch_sizes) {
  LayerSizes& z = layer.size;
  layer.packed = batch_sizes.has_value() && batch_sizes->defined();
  if (layer.packed) {
    const Tensor& sizes = *batch_sizes;
    TORCH_CHECK(layer.x.dim() == 2, "input with batch_sizes must have 2 dimensions, got ", layer.x.dim());
    TORCH_CHECK(sizes.device().is_cpu() && sizes.scalar_type() == at::kLong && sizes.dim() == 1,
                "batch_sizes must be a 1-D int64 tensor on the CPU, got ", sizes.dim(), "-D ", sizes.scalar_type(),
                " on ", sizes.device());
    check_there(sizes, "batch_sizes");
    z.T = sizes.size(0);
  } else {
    TORCH_CHECK(layer.x.dim() == 3, "input must have 3 dimensions, got ", layer.x.dim());
    z.T = layer.x.size(0);
  }
  TORCH_CHECK(z.T > 0, "Expected sequence length to be larger than 0 in RNN");
  TORCH_CHECK(z.T < kMost && few_enough(layer.x), "input of sizes ", layer.x.sizes(), " in ", z.T,
              " steps is larger than any memory: can't allocate memory");
  layer.steps = c10::GetCPUAllocator()->allocate(2 * z.T * sizeof(int64_t));  // torch's error where there is no memory
  int64_t* const active = static_cast<int64_t*>(layer.steps.get());
  int64_t* const offset = active + z.T;
  if (layer.packed) {
    const Tensor values = batch_sizes->contiguous();
    std::copy_n(values.const_data_ptr<int64_t>(), z.T, active);
  } else {
    std::fill_n(active, z.T, layer.x.size(1));
  }
  z.N = 0;
  for (int64_t t = 0; t < z.T; ++t) {
    const int64_t rows = active[t];
    TORCH_CHECK(!layer.packed || (rows > 0 && (t == 0 || rows <= active[t - 1])),
                "batch_sizes must be positive and not increase, got ", rows, " at step ", t);
    TORCH_CHECK(!layer.packed || rows <= layer.x.size(0) - z.N, "batch_sizes must add up to the rows of the input, ",
                layer.x.size(0), ", got more by step ", t);
    offset[t] = z.N;
    z.N += rows;
  }
  TORCH_CHECK(!layer.packed || z.N == layer.x.size(0), "batch_sizes must add up to the rows of the input, ",
              layer.x.size(0), ", got ", z.N);
  z.B = active[0];
  z.active = active;
  z.offset = offset;
}

void read_weights(Layer& layer, at::TensorList weights, int directions) {
  const auto order = WeightOrder::of(weights.size(), directions);
  TORCH_CHECK(order.has_value(), "weights must hold w_ih, w_hh[, b_ih, b_hh][, w_hr] for each of ", directions,
              " direction(s), got ", weights.size(), " tensors");
  LayerSizes& z = layer.size;
  z.D = directions;
  z.projected = order->projected;
  z.I = layer.x.size(-1);
  const int64_t G = layer.constants().gates;
  TORCH_CHECK(!z.projected || layer.constants().projectable, "cell ", layer.constants().name,
              " cannot be projected: w_hr given");
  const Tensor& w_hh = *order->at(weights, 0).w_hh;  // [G*H, R]
  check_there(w_hh, "w_hh");
  TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(0) % G == 0 && w_hh.size(0) > 0, "w_hh must have shape [", G, "*H, H], got ",
              w_hh.sizes());
  z.H = w_hh.size(0) / G;
  z.R = z.projected ? w_hh.size(1) : z.H;
  const auto contiguous = [](const Tensor* t) { return t ? aligned(t->contiguous()) : Tensor(); };
  for (int d = 0; d < directions; ++d) {
    const ListedWeights w = order->at(weights, d);
    each_weight(w, G, z.I, z.H, z.R, [&](const char* name, const Tensor& t, at::IntArrayRef shape) {
      check_tensor(t, layer.x, name, shape);
    });
    layer.weights.push_back(w.map(contiguous));
  }
}

}  // namespace

Layer read_layer(const Tensor& x, const OptionalTensor& batch_sizes, const OptionalTensor& h0, const OptionalTensor& c0,
                 at::TensorList weights, c10::string_view cell, bool bidirectional, const Noise& noise) {
  check_there(x, "input");
  Layer layer;
  layer.cell = find_cell(std::string_view(cell.data(), cell.size()));
  TORCH_CHECK_VALUE(layer.cell >= 0, "unknown cell '", cell, "'");
  layer.dtype = x.scalar_type();
  TORCH_CHECK_TYPE(layer.kernel_dtype() >= 0, "fusedrnn supports float32, float64, bfloat16 and float16, got ",
                   layer.dtype);
  layer.x = aligned(x.dim() > 0 && x.stride(-1) == 1 ? x : x.contiguous());
  read_steps(layer, batch_sizes);
  const int directions = bidirectional ? 2 : 1;
  read_weights(layer, weights, directions);
  const LayerSizes& z = layer.size;
  if (backend_of(x).even_rows && !has_even_rows(rows(layer.x, layer.packed), z)) {
    layer.x = layer.x.contiguous();
  }
  layer.h0 = check_optional(h0, x, "h0", {directions, z.B, z.R});
  layer.c0 = check_optional(c0, x, "c0", {directions, z.B, z.H});
  TORCH_CHECK(layer.constants().states == 2 || !layer.c0.defined(), "cell ", layer.constants().name, " has no c0");
  layer.mask_h = check_optional(noise.mask_h, x, "mask_h", {directions, z.B, z.R});
  layer.keep_h = check_rows(noise.keep_h, layer, "keep_h", z.R);
  layer.keep_c = check_rows(noise.keep_c, layer, "keep_c", z.H);
  TORCH_CHECK(layer.constants().states == 2 || !layer.keep_c.defined(), "cell ", layer.constants().name, " has no c");
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

int kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return static_cast<int>(DType::kFloat32);
    case at::kDouble: return static_cast<int>(DType::kFloat64);
    case at::kBFloat16: return static_cast<int>(DType::kBFloat16);
    case at::kHalf: return static_cast<int>(DType::kFloat16);
    default: return -1;
  }
}

void Layer::widen_without_kernel() {
  if (backend_of(x).has(cell, kernel_dtype())) return;
  dtype = at::kFloat;
  const auto widened = [](const Tensor& t) { return t.defined() ? widened_to_float(t) : t; };
  for (Tensor* t : {&x, &h0, &c0, &mask_h, &keep_h, &keep_c}) *t = widened(*t);
  for (DirectionWeights& w : weights) w = w.map(widened);
}

const void* input(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

void* output(const Tensor& t, std::initializer_list<int64_t> shape, int64_t part, int64_t parts) {
  if (!t.defined() || t.numel() == 0) return nullptr;
  const at::IntArrayRef one(shape);
  const bool fits = t.dim() == static_cast<int64_t>(one.size()) && t.size(0) == parts * one[0] &&
                    t.sizes().slice(1) == one.slice(1) && t.is_contiguous() && 0 <= part && part < parts;
  TORCH_INTERNAL_ASSERT(fits, "a result of shape ", t.sizes(), ", for ", parts, " parts of shape ", one);
  return static_cast<char*>(t.mutable_data_ptr()) + part * (t.numel() / parts) * t.element_size();
}

RowView rows(const Tensor& t, bool packed) {
  if (!t.defined()) return {nullptr, 0, 0};
  return packed ? RowView{t.const_data_ptr(), -1, t.stride(0)} : RowView{t.const_data_ptr(), t.stride(0), t.stride(1)};
}

int threads() { return at::in_parallel_region() || forked() ? 1 : at::get_num_threads(); }

}  // namespace fusedrnn
