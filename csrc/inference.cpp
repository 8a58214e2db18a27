// See inference.h.
#include "target.h"

#include "inference.h"

#include <omp.h>

#include <algorithm>

#include "backend.h"
#include "cpu/plan.h"

namespace fusedrnn {

std::shared_ptr<const PackedWeights::Layer> PackedWeights::find(size_t layer) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return layer < layers_.size() ? layers_[layer] : nullptr;
}

void PackedWeights::keep(size_t layer, std::shared_ptr<const Layer> found) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (layer >= layers_.size()) layers_.resize(layer + 1);
  layers_[layer].swap(found);  // the old one goes after the lock
}

int64_t PackedWeights::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t total = 0;
  for (const auto& layer : layers_) total += layer && layer->memory.defined() ? layer->memory.nbytes() : 0;
  return total;
}

namespace {

#include "cpu/order.h"

// body(index) on at most `threads` threads. They meet first: only then has a sanitizer seen what the region shares.
template <class Body>
void on_threads(int threads, const Body& body) {
  before_others();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    before_others();
#pragma omp barrier
    after_others();
    body(omp_get_thread_num());
    before_others();
  }
  after_others();
}

// Packing costs as much as the products of a few rows. With more rows than these it is less than a hundredth of a call.
constexpr int64_t kRowsKept = 512;

constexpr int kPassedOver = 3;  // calls in a row that cannot use panels before others take their place

bool fits(const Tensor& t, const Tensor& x, Sizes shape, Elements elements) {
  return t.defined() && t.sizes() == shape && t.elements() == elements && t.device() == x.device() && is_there(t);
}

// Contents of t, 64 KiB at a time, by all threads if there are a few.
uint64_t digest(const Tensor& t, uint64_t seed) {
  constexpr int64_t kBlock = int64_t{1} << 16, kFew = 4;
  const char* data = static_cast<const char*>(t.data());
  const int64_t bytes = t.nbytes(), blocks = (bytes + kBlock - 1) / kBlock;
  std::vector<uint64_t> parts(blocks);
  on_threads(blocks > kFew ? threads() : 1, [&](int) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
      parts[i] = kernels().digest(data + i * kBlock, std::min(kBlock, bytes - i * kBlock), seed + i);
    }
  });
  return kernels().digest(parts.data(), blocks * static_cast<int64_t>(sizeof(uint64_t)), bytes);
}

// Of everything that the panels depend on but the members of the teams. (Biases are not packed.)
uint64_t digest(const Layer& layer) {
  const LayerSizes& z = layer.size;
  std::vector<uint64_t> parts = {static_cast<uint64_t>(layer.cell), static_cast<uint64_t>(layer.dtype),
                                 static_cast<uint64_t>(z.I),        static_cast<uint64_t>(z.H),
                                 static_cast<uint64_t>(z.R),        static_cast<uint64_t>(layer.matrices)};
  for (const DirectionWeights& w : layer.weights) {
    for (const Tensor* t : {&w.w_ih, &w.w_hh, &w.w_hr}) {
      if (t->defined()) parts.push_back(digest(*t, parts.size()));
    }
  }
  return kernels().digest(parts.data(), parts.size() * sizeof(uint64_t), 0);
}

// One layer of the stack with its results.
struct Work {
  Layer layer;
  ForwardProblem problem;
  std::shared_ptr<const PackedWeights::Layer> packed;  // what this call reads
  std::shared_ptr<PackedWeights::Layer> fresh;         // or fills
  Panels panels{nullptr, 0, false};
};

void use_panels(Work& work, const Panels& panels) {
  work.panels = panels;
  work.problem.panels = &work.panels;
}

Tensor memory_for_panels(const Layer& layer) {
  return empty(Sizes({panel_bytes(layer)}), aoti_torch_dtype_uint8(), layer.x.device());
}

void find_panels(Work& work, size_t index, PackedWeights& kept) {
  const LayerSizes& z = work.layer.size;
  if (z.N <= kRowsUnpacked || z.N > kRowsKept) return;
  const uint64_t now = digest(work.layer);
  work.packed = kept.find(index);
  if (!work.packed || work.packed->digest != now) {
    kept.keep(index, std::make_shared<PackedWeights::Layer>(now));
    work.packed = nullptr;
  } else if (work.packed->memory.defined()) {
    use_panels(work, work.packed->panels);
  } else {
    // Of a copy: another thread may write the weights between their digest and the packing.
    for (int d = 0; d < z.D; ++d) {
      DirectionWeights& w = work.layer.weights[d];
      w = w.map([](const Tensor& t) { return t.defined() ? t.copy() : t; });
      work.problem.weights[d] = w.map(input);
    }
    work.packed = nullptr;
    work.fresh = std::make_shared<PackedWeights::Layer>(digest(work.layer), memory_for_panels(work.layer));
    use_panels(work, {work.fresh->memory.mutable_data(), 0, false});
  }
}

// After the call.
void keep_panels(const Work& work, size_t index, PackedWeights& kept) {
  if (work.fresh) {
    work.fresh->panels = work.panels;
    kept.keep(index, work.fresh);
  } else if (work.packed) {
    const bool used = work.panels.used && work.panels.data == work.packed->panels.data;
    std::atomic<int>& passed_over = work.packed->passed_over;
    if (used) {
      passed_over = 0;
      ++kept.uses;
    } else if (++passed_over == kPassedOver) {
      kept.keep(index, std::make_shared<PackedWeights::Layer>(work.packed->digest));
    }
  }
}

// What every step keeps of each state, as a row of zoneout's masks: [2, D * max(H, R)]; undefined if nothing.
Tensor rows_kept(const Zoneout& zoneout, const LayerSizes& z, const Tensor& x) {
  if (zoneout.first == 0 && zoneout.second == 0) return {};
  const int64_t width = z.D * std::max(z.H, z.R);
  std::vector<double> rows(2 * width, zoneout.first);
  std::fill(rows.begin() + width, rows.end(), zoneout.second);
  const Tensor wide = empty(Sizes({2, width}), DType::kFloat64, x.device());
  std::copy(rows.begin(), rows.end(), static_cast<double*>(wide.mutable_data()));
  return wide.to(x.elements());
}

StateNoise noise_of(const Zoneout& zoneout, const Tensor& rows) {
  StateNoise noise;  // every step and sample at the same row
  if (zoneout.first != 0) noise.keep_h.data = input(rows);
  if (zoneout.second != 0) noise.keep_c.data = static_cast<const char*>(input(rows)) + rows.nbytes() / 2;
  return noise;
}

bool run(const Layer& layer, const ForwardProblem& problem) { return forward_kernel(layer)(problem); }

// As the kernels take a tensor of the call: one of a single step has no dimension of time, or of direction.
OptionalTensor with_time(const ModuleCall& call, const OptionalTensor& t) {
  return t && call.one_step ? OptionalTensor(with_one(*t)) : t;
}
// Rows [first, first + count) of t.
Tensor part_of(const Tensor& t, int64_t first, int64_t count) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes[0] = count;
  return t.viewed(sizes, t.strides(), first * t.stride(0));
}
Tensors weights_of(const Tensors& all, int64_t first, int64_t count) {
  return {all.begin() + first, all.begin() + first + count};
}

std::optional<Tensors> scales_of_layer(const ModuleCall& call, int64_t layer, int64_t each) {
  return call.scales ? std::optional<Tensors>(weights_of(*call.scales, layer * each, each)) : std::nullopt;
}

// Steps [begin, end) of a dense batch through a layer of one direction; the states go on from h_n and c_n.
ForwardProblem steps_of(const Work& work, int64_t begin, int64_t end) {
  ForwardProblem p = work.problem;
  const int64_t bytes = Elements(work.layer.dtype).bytes();
  p.size.T = end - begin;
  p.size.N = p.size.T * p.size.B;
  p.x.data = static_cast<const char*>(p.x.data) + begin * p.x.time * bytes;
  p.y = static_cast<char*>(p.y) + begin * p.size.B * p.size.R * bytes;
  if (begin > 0) {
    p.h0 = p.h_n;
    p.c0 = p.c_n;
  }
  return p;
}

// Layer l works on chunk w - l in wave w; the layers of a wave are independent.
bool run_pipeline(const std::vector<Work>& stack, int64_t steps, int threads) {
  const int64_t T = stack[0].layer.size.T, layers = stack.size(), chunks = (T + steps - 1) / steps;
  std::atomic<bool> done{true};
  on_threads(static_cast<int>(std::min<int64_t>(threads, layers)), [&](int) {
    for (int64_t wave = 0; wave < chunks + layers - 1; ++wave) {
#pragma omp for schedule(static, 1)
      for (int64_t l = 0; l < layers; ++l) {
        const int64_t begin = (wave - l) * steps;
        if (begin < 0 || begin >= T || !done) continue;
        if (!run(stack[l].layer, steps_of(stack[l], begin, std::min(begin + steps, T)))) done = false;
      }
    }
  });
  return done;
}

}  // namespace

bool has_kernels(const Tensor& x) { return backend_of(x).host && x.elements() != Elements(DType::kFloat16); }

LayerArguments arguments_of(const ModuleCall& call) {
  return {*with_time(call, call.x), std::nullopt, with_time(call, call.h0),
          with_time(call, call.c0), call.weights, cell_constants(call.cell).name,
          call.directions == 2,     {},           call.scales};
}

bool fits(const ModuleCall& call) {
  const Tensor& x = call.x;
  const CellConstants& cell = cell_constants(call.cell);
  constexpr int64_t kMost = int64_t{1} << 31;  // no product of two sizes overflows
  for (const int64_t size : {call.layers, call.I, call.H, call.R}) {
    if (size < 0 || size > kMost) return false;
  }
  if (cell.states > 2) return false;  // the ops take them
  const auto order = WeightOrder::of(cell, call.weights.size(), call.parts());
  if (!order || call.H == 0 || call.R == 0) return false;
  const Matrices matrices = matrices_of(call.scales);
  const bool int8 = matrices == Matrices::kInt8;
  if (int8 && static_cast<int64_t>(call.scales->size()) != order->scales() * call.parts()) return false;
  if (order->projected ? !cell.projectable : call.R != call.H) return false;
  const int64_t batch = call.one_step ? 0 : 1;  // the dimension of the samples
  if (!x.defined() || !has_backend(x) || x.dim() != batch + 2 || x.size(-1) != call.I || !is_there(x)) return false;
  if (x.elements().kernel_dtype() < 0 || !steps_fit(x)) return false;
  if (int8 && std::max({call.I, call.H, call.R * call.directions}) > kMostBytes) return false;
  const bool small_fit = x.elements() == Elements(DType::kFloat32) && backend_of(x).small_weights;
  if (matrices != Matrices::kAsInput && (!small_fit || !has_small_weights(call.cell))) return false;
  if (call.one_step && call.parts() > 1 && (call.h0 || call.c0)) return false;  // they have no room for several layers
  const int64_t B = x.size(batch), width = call.R * call.directions;
  for (const auto& [state, columns] : {std::pair(&call.h0, call.R), std::pair(&call.c0, call.H)}) {
    if (!state->has_value()) continue;
    const int64_t shape[] = {call.parts(), B, columns};
    if (!fits(**state, x, Sizes(shape, 3).from(1 - batch), x.elements())) return false;
  }
  bool fit = true;
  for (int64_t part = 0; fit && part < call.parts(); ++part) {
    const int64_t columns = part < call.directions ? call.I : width;
    each_weight(order->at(call.weights.data(), part), cell, columns, call.H, call.R,
                [&](const char*, const Tensor& w, Sizes shape) {
                  fit = fit && fits(w, x, shape, elements_of_weight(x, shape, matrices));
                });
    if (!int8) continue;
    each_scale(order->scales_at(call.scales->data(), part), cell.gates, call.H, call.R,
               [&](const char*, const Tensor& s, Sizes shape) { fit = fit && fits(s, x, shape, x.elements()); });
  }
  return fit;
}

std::optional<Inferred> infer(const ModuleCall& call, PackedWeights& kept, const Zoneout& zoneout) {
  if (!has_kernels(call.x)) return std::nullopt;
  const int64_t layers = call.layers, D = call.directions, each = call.weights.size() / layers;
  const int64_t each_scales = call.scales ? call.scales->size() / layers : 0;
  const Tensor x = *with_time(call, call.x);
  const OptionalTensor h0 = with_time(call, call.h0), c0 = with_time(call, call.c0);

  const char* const name = cell_constants(call.cell).name;
  std::vector<Work> stack(layers);
  int64_t steps = 0;           // of a chunk, if the layers run side by side
  std::vector<Tensor> memory;  // of panels that are not kept
  Tensor input = x, h_n, c_n, keep;
  for (int64_t l = 0; l < layers; ++l) {
    const auto of_layer = [&](const OptionalTensor& state) {
      return state && layers > 1 ? part_of(*state, l * D, D) : state;
    };
    Work& work = stack[l];
    work.layer = read_layer({input,
                             std::nullopt,
                             of_layer(h0),
                             of_layer(c0),
                             weights_of(call.weights, l * each, each),
                             name,
                             D == 2,
                             {},
                             scales_of_layer(call, l, each_scales)});
    const LayerSizes& z = work.layer.size;
    if (l == 0) {
      // States are rounded to the type of x between chunks: the same numbers only where that is the compute type.
      if (work.layer.dtype == work.layer.compute_type()) {
        const int lanes = kernels().vector_bytes / static_cast<int>(Elements(work.layer.dtype).bytes());
        steps = pipeline_steps(z, work.layer.constants().gates, lanes, layers, threads());
      }
      keep = rows_kept(zoneout, z, x);
      const int64_t rows_of_c = work.layer.constants().states == 2 ? layers * D : 0;
      const auto states = [&](int64_t n, int64_t width) {  // those of a single step: the results' shape, no view of it
        return call.one_step && n ? with_one(empty({z.B, width}, x)) : empty({n, z.B, width}, x);
      };
      h_n = states(layers * D, z.R);
      c_n = states(rows_of_c, z.H);
    }
    const bool bare = call.one_step && l + 1 == layers;
    const Tensor y = bare ? with_one(empty({z.B, D * z.R}, x)) : empty({z.T, z.B, D * z.R}, x);
    fill(work.problem, work.layer);
    work.problem.noise = noise_of(zoneout, keep);
    work.problem.y = output(y, {z.T, z.B, D * z.R});
    input = y;
    work.problem.h_n = output(h_n, {D, z.B, z.R}, l, layers);
    work.problem.c_n = output(c_n, {D, z.B, z.H}, l, layers);
    work.problem.saved = nullptr;
    work.problem.saved_stride = 0;
    if (steps || z.B == 0) continue;
    find_panels(work, l, kept);
    check_memory(run(work.layer, work.problem));
    keep_panels(work, l, kept);
    work = Work();  // its input is not needed any more
  }
  if (steps && x.size(1) > 0) {
    for (int64_t l = 0; l < layers; ++l) {
      Work& work = stack[l];
      work.problem.threads = 1;
      find_panels(work, l, kept);
      // A pipeline has no teams, and without panels of its own would pack in each chunk.
      if (work.panels.data && work.panels.members <= 1) continue;
      memory.push_back(memory_for_panels(work.layer));
      use_panels(work, {memory.back().mutable_data(), 0, false});
    }
    check_memory(run_pipeline(stack, steps, threads()));
    for (int64_t l = 0; l < layers; ++l) keep_panels(stack[l], l, kept);
  }
  return Inferred{input, h_n, c_n};
}

std::unique_ptr<Stepper> Stepper::make(const ModuleCall& call, const Zoneout& zoneout) {
  const Tensor& x = call.x;
  bool dense =
      has_kernels(x) && call.one_step && call.directions == 1 && x.size(0) > 0 && cell_constants(call.cell).states <= 2;
  const Tensors scales = call.scales.value_or(Tensors());
  for (const Tensors* list : {&call.weights, &scales}) {
    for (const Tensor& w : *list) dense = dense && w.is_contiguous();
  }
  if (!dense) return nullptr;
  auto stepper = std::make_unique<Stepper>();
  stepper->elements_ = x.elements();
  stepper->two_states_ = cell_constants(call.cell).states == 2;
  for (const Tensors* list : {&call.weights, &scales}) {
    for (const Tensor& w : *list) stepper->shapes_.push_back({{w.sizes().begin(), w.sizes().end()}, w.elements()});
  }
  stepper->weights_ = call.weights.size();
  const size_t each = call.weights.size() / call.layers, each_scales = scales.size() / call.layers;
  Tensor input = with_one(x).contiguous();
  for (int64_t l = 0; l < call.layers; ++l) {
    Layer layer = read_layer({input,
                              std::nullopt,
                              std::nullopt,
                              std::nullopt,
                              weights_of(call.weights, l * each, each),
                              cell_constants(call.cell).name,
                              false,
                              {},
                              scales_of_layer(call, l, each_scales)});
    const LayerSizes& z = layer.size;
    if (l == 0) stepper->keep_ = rows_kept(zoneout, z, x);
    ForwardProblem problem;
    problem.size = z;
    problem.noise = noise_of(zoneout, stepper->keep_);
    problem.saved = nullptr;
    problem.saved_stride = 0;
    problem.x = rows(input, false);
    problem.x.data = nullptr;
    stepper->problems_.push_back(problem);
    input = empty({1, z.B, z.R}, x);
    layer.x = Tensor();
    layer.weights.clear();
    layer.scales.clear();
    stepper->layers_.push_back(std::move(layer));
  }
  return stepper;
}

bool Stepper::fits(const Tensor& t, Sizes shape, Elements elements) {
  return t.defined() && t.elements() == elements && t.sizes() == shape && t.is_contiguous() && is_there(t) &&
         is_aligned(t) && t.device().is_cpu();
}

std::optional<Inferred> Stepper::step(const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                      const Tensors& weights, const Tensors& scales) const {
  const LayerSizes& first = layers_[0].size;
  const int64_t B = first.B, H = first.H, R = first.R, layers = layers_.size();
  const auto like_x = [&](const Tensor& t, Sizes shape) { return fits(t, shape, elements_); };
  bool fit = like_x(x, {B, first.I}) && (!h0 || like_x(*h0, {layers, B, R})) && (!c0 || like_x(*c0, {layers, B, H})) &&
             c0.has_value() == (two_states() && h0.has_value());
  for (size_t i = 0; i < shapes_.size(); ++i) {
    const Tensor& t = i < weights_ ? weights[i] : scales[i - weights_];
    fit = fit && fits(t, shapes_[i].shape, shapes_[i].elements);
  }
  if (!fit) return std::nullopt;
  const Tensor y = empty({B, R}, x), h_n = empty({layers, B, R}, x);
  const Tensor c_n = empty({two_states() ? layers : 0, B, H}, x);
  const WeightOrder order = *WeightOrder::of(layers_[0].constants(), weights.size(), layers);
  const auto state = [&](const OptionalTensor& t, int64_t l, int64_t width) {
    return t ? static_cast<const char*>(input(*t)) + l * B * width * x.element_bytes() : nullptr;
  };
  const void* rows_of_x = input(x);
  for (int64_t l = 0; l < layers; ++l) {
    ForwardProblem p = problems_[l];
    p.threads = threads();
    p.weights[0] = order.at(weights.data(), l).map([](const Tensor* t) { return t ? input(*t) : nullptr; });
    if (!scales.empty()) p.scales[0] = scales_of(order.scales_at(scales.data(), l));
    p.x.data = rows_of_x;
    p.h0 = state(h0, l, R);
    p.c0 = state(c0, l, H);
    p.h_n = output(h_n, {1, B, R}, l, layers);
    p.c_n = output(c_n, {1, B, H}, l, layers);
    p.y = l + 1 == layers ? output(y, {B, R}) : p.h_n;  // of a lower layer, the same
    rows_of_x = p.h_n;
    check_memory(run(layers_[l], p));
  }
  return Inferred{y, h_n, c_n};
}

}  // namespace fusedrnn
