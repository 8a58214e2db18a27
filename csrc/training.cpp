// See training.h.
#include "training.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <atomic>
#include <unordered_map>

#include "borrowed.h"
#include "second_order.h"

namespace fusedrnn {

bool watched() {
  return c10::impl::dispatch_mode_enabled() || at::impl::torch_function_mode_enabled() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer);
}

namespace {

using torch::autograd::AutogradContext;
using List = torch::autograd::variable_list;

const Interface* library = nullptr;
LongWay long_way = nullptr;

constexpr int64_t kFewRows = 32;     // of a step that wait for others; more are worth a product of their own
constexpr int64_t kMostRows = 4096;  // that wait

// The number of the backward pass that calls this node; none if it is called by hand or by compiled autograd.
template <class F>
std::optional<int> task_of(const AutogradContext* ctx) {
  const auto node = torch::autograd::get_current_node();
  const auto* const own = dynamic_cast<const torch::autograd::CppNode<F>*>(node.get());
  const int task = torch::autograd::get_current_graph_task_id();
  return own && &own->ctx_ == ctx && task >= 0 ? std::optional<int>(task) : std::nullopt;
}

// An object as the memory of a tensor, for compiled autograd takes nodes that keep tensors, and no others.
template <class T>
struct Boxed {
  static at::Tensor make(std::unique_ptr<T> object) {
    c10::DataPtr data(object.get(), object.get(), &destroy, c10::kCPU);
    object.release();
    c10::Storage storage(c10::Storage::use_byte_size_t(), 0, std::move(data), nullptr, false);
    return at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                    caffe2::TypeMeta::Make<uint8_t>());
  }
  // Null where it is another tensor.
  static T* in(const at::Tensor& t) {
    if (!t.defined() || !t.has_storage()) return nullptr;
    const c10::DataPtr& data = t.storage().data_ptr();
    return data.get_deleter() == &destroy ? static_cast<T*>(data.get_context()) : nullptr;
  }
  static void destroy(void* object) { delete static_cast<T*>(object); }
};

// What a step leaves to the gradients of the weights. What may be written before they are computed is copied.
class Rows {
 public:
  // [B, *]; gates as BackwardProblem::dgates.
  Rows(at::Tensor of_gates, const at::Tensor& x, const at::Tensor& h)
      : gates(std::move(of_gates)), x(alone(x)), h(alone(h)), before_{state_of(x), state_of(h)} {}
  void check_unchanged() const {
    TORCH_CHECK(state_of(x) == before_[0] && state_of(h) == before_[1],
                "fusedrnn: the input or the state of a cell has been modified by an inplace operation during backward, "
                "before the gradients of the weights were computed");
  }
  at::Tensor gates, x, h;

 private:
  // Without its graph, which holds the node that holds the rows; of the same version.
  static at::Tensor alone(const at::Tensor& t) {
    const c10::TensorImpl& impl = *t.unsafeGetTensorImpl();
    return at::Tensor(impl.shallow_copy_and_detach(impl.version_counter(), false));
  }
  using State = std::pair<uint32_t, size_t>;  // version, bytes
  static State state_of(const at::Tensor& t) {
    return {t.unsafeGetTensorImpl()->version_counter().current_version(), t.storage().nbytes()};
  }

  State before_[2];
};

at::Tensor joined(const std::vector<Rows>& rows, at::Tensor Rows::* part) {
  if (rows.size() == 1) return rows[0].*part;
  List all;
  for (const Rows& r : rows) all.push_back(r.*part);
  return at::cat(all);
}

// Of one backward pass: the rows that wait, and the sums over those before.
struct Waiting {
  std::vector<Rows> rows;
  int64_t count = 0;
  List sums;  // for w_ih, w_hh, b_ih, b_hh, in the type of the gates: autograd casts

  void add_up(const CellConstants& cell) {
    if (rows.empty()) return;
    const c10::AutoGradMode no_graph(false);
    for (const Rows& r : rows) r.check_unchanged();
    const at::Tensor gates = joined(rows, &Rows::gates), x = joined(rows, &Rows::x), h = joined(rows, &Rows::h);
    const int64_t H = h.size(1), all = cell.gates * H, split = cell.split * H;
    // By W_hh h + b_hh; and by W_ih x + b_ih, which is the same but for the last gates.
    const at::Tensor recurrent = gates.narrow(1, 0, all);
    const at::Tensor input[] = {gates.narrow(1, 0, all - split), gates.narrow(1, all, split)};
    const auto product = [](const at::Tensor& left, const at::Tensor& right, at::Tensor result) {
      at::mm_out(result, left.t(), right.to(left.scalar_type()));
    };
    const at::Tensor w_ih = at::empty({all, x.size(1)}, gates.options()), w_hh = at::empty({all, H}, gates.options());
    product(recurrent, h, w_hh);
    product(input[0], x, w_ih.narrow(0, 0, all - split));
    if (split > 0) product(input[1], x, w_ih.narrow(0, all - split, split));
    const at::Tensor b_hh = recurrent.sum(0);
    const at::Tensor b_ih = split > 0 ? at::cat({b_hh.narrow(0, 0, all - split), input[1].sum(0)}) : b_hh.clone();
    const List more = {w_ih, w_hh, b_ih, b_hh};
    for (size_t i = 0; i < more.size(); ++i) {
      if (sums.size() < more.size()) {
        sums.push_back(more[i]);
      } else {
        sums[i] = sums[i] + more[i];
      }
    }
    rows.clear();
    count = 0;
  }
};

// Of all backward passes under way, each of which runs on one thread.
class WaitingRows {
 public:
  explicit WaitingRows(const CellConstants& cell) : cell_(cell) {}
  void add(int task, Rows rows) {
    Waiting& waiting = of(task);
    waiting.count += rows.x.size(0);
    waiting.rows.push_back(std::move(rows));
    if (waiting.count >= kMostRows) waiting.add_up(cell_);
  }
  bool used() const { return used_; }  // by a backward pass
  void use() { used_ = true; }
  List sums(int task) {  // and no more of this backward pass
    Waiting waiting = std::move(of(task));
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.erase(task);
    }
    waiting.add_up(cell_);
    return waiting.sums;
  }

 private:
  Waiting& of(int task) {  // which stays where it is
    const std::lock_guard<std::mutex> lock(mutex_);
    return tasks_[task];
  }

  const CellConstants& cell_;
  std::atomic<bool> used_{false};
  std::mutex mutex_;
  std::unordered_map<int, Waiting> tasks_;
};
using SharedRows = std::shared_ptr<WaitingRows>;

// Gives for each weight what stands for it in the graph: a tensor of its sizes, without memory. Back come gradients, or
// nothing, where rows wait.
struct WeightSums : torch::autograd::Function<WeightSums> {
  static List forward(AutogradContext* ctx, at::TensorList weights, const SharedRows& rows) {
    const at::AutoDispatchBelowADInplaceOrView no_views;
    ctx->set_materialize_grads(false);
    ctx->saved_data["rows"] = Boxed<SharedRows>::make(std::make_unique<SharedRows>(rows));
    List stands;
    for (const at::Tensor& w : weights) stands.push_back(at::zeros({1}, w.options()).expand(w.sizes()));
    return stands;
  }

  static List backward(AutogradContext* ctx, const List& from) {
    const SharedRows* const rows = Boxed<SharedRows>::in(ctx->saved_data["rows"].toTensor());
    if (rows) (*rows)->use();
    const std::optional<int> task = task_of<WeightSums>(ctx);
    const List sums = rows && task ? (*rows)->sums(*task) : List();
    List result = from;
    for (size_t i = 0; i < from.size() && !sums.empty(); ++i) {
      if (ctx->needs_input_grad(i)) result[i] = from[i].defined() ? from[i] + sums[i] : sums[i];
    }
    result.emplace_back();  // for `rows`
    return result;
  }
};

}  // namespace

struct Sums {
  Sums(const CellConstants& cell, const List& weights) : rows(std::make_shared<WaitingRows>(cell)) {
    for (const at::Tensor& w : weights) {
      seen.push_back({w.unsafeGetTensorImpl(), w.requires_grad(), w.sizes().vec(), w.options()});
    }
  }
  // A graph holds the weights that it differentiates, which are leaves: where one was, there is no other. Its data may
  // be. What a backward pass has used is done with: later steps have a node that autograd calls after them and not
  // after all that was computed before.
  bool serve(const List& weights) const {
    bool same = weights.size() == seen.size() && !rows->used();
    for (size_t i = 0; same && i < weights.size(); ++i) {
      const at::Tensor& w = weights[i];
      same = w.unsafeGetTensorImpl() == seen[i].identity && w.requires_grad() == seen[i].differentiated &&
             w.sizes() == seen[i].sizes && w.dtype() == seen[i].options.dtype() &&
             w.device() == seen[i].options.device();
    }
    return same;
  }

  struct Weight {
    const c10::TensorImpl* identity;
    bool differentiated;
    std::vector<int64_t> sizes;
    at::TensorOptions options;
  };
  List stands_for(const List& weights) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (stands.empty()) stands = WeightSums::apply(at::TensorList(weights), rows);
    return stands;
  }

  const SharedRows rows;
  std::vector<Weight> seen;
  std::mutex mutex;
  List stands;  // from the second step on
};

KeptSums::Found KeptSums::find(const CellConstants& cell, const CellStep& step) {
  const bool begins =
      std::none_of(step.states.begin(), step.states.end(), [](const at::Tensor& s) { return s.requires_grad(); });
  Found found;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto kept = sums_.lock()) found.sums = at::Tensor(kept);
  }
  if (Sums* const sums = Boxed<Sums>::in(found.sums); !begins && sums && sums->serve(step.weights)) {
    found.stands = sums->stands_for(step.weights);
    return found;
  }
  found.sums = Boxed<Sums>::make(std::make_unique<Sums>(cell, step.weights));
  const std::lock_guard<std::mutex> lock(mutex_);
  sums_ = found.sums.getIntrusivePtr();
  return found;
}

ModuleCall call_of(CellStep& step) {
  ModuleCall call;
  call.cell = step.cell;
  call.one_step = true;
  call.layers = call.directions = 1;
  call.I = step.x.size(1);
  const CellConstants& cell = library->constants(step.cell);
  call.H = call.R = step.weights[1].size(0) / (cell.first > 0 ? cell.gates : cell.parameters);
  call.x = borrowed(step.x);
  OptionalTensor* const into[] = {&call.h0, &call.c0};
  for (size_t s = 0; s < step.states.size(); ++s) *into[s] = borrowed(step.states[s]);
  for (at::Tensor& w : step.weights) call.weights.push_back(borrowed(w));
  return call;
}

at::Tensor without_first(const Tensor& t) {
  at::Tensor result = as_torch(t);
  result.unsafeGetTensorImpl()->set_sizes_contiguous(result.sizes().slice(1).vec());
  return result;
}

bool all_plain(const List& from, const List& saved) {
  const auto derived = [](const at::Tensor& t) { return t.defined() && (!plain(t) || t._fw_grad(0).defined()); };
  return !watched() && std::none_of(from.begin(), from.end(), derived) &&
         std::none_of(saved.begin(), saved.end(), derived);
}

namespace {

// Whether x and h are parameters of somebody's, or views of one, which an optimizer may write in the backward pass.
struct Copies {
  bool x, h;
};
bool is_parameter(const at::Tensor& t) {
  const auto differentiated = [](const at::TensorBase& leaf) { return leaf.is_leaf() && leaf.requires_grad(); };
  return differentiated(t) || (t.is_view() && differentiated(t._base()));
}

// The backward pass of a step as it is computed: see StepGradients.
List by_kernel(CellStep& step, at::Tensor& h, at::Tensor& saved, List& from, const std::vector<bool>& wanted,
               Sums* sums, std::optional<int> task, Copies copies) {
  List result(wanted.size());
  const auto given = [](const at::Tensor& t) { return t.defined(); };
  if (std::none_of(from.begin(), from.end(), given)) return result;
  const size_t states = step.states.size(), first_weight = 1 + states;
  const bool weights =
      std::any_of(wanted.begin() + static_cast<int64_t>(first_weight), wanted.end(), [](bool w) { return w; });
  const bool wait = weights && sums && task;
  OptionalTensor cotangents[2];
  for (size_t i = 0; i < from.size(); ++i) {
    if (given(from[i])) cotangents[i] = borrowed(from[i]);
  }
  const LayerGradients g = library->backward(call_of(step), cotangents[0], cotangents[1], borrowed(h), borrowed(saved),
                                             {wanted[0], weights && !wait, wait, false});
  if (wanted[0]) result[0] = without_first(g.x);
  if (states > 0) result[1] = without_first(g.h0);
  if (states > 1) result[2] = without_first(g.c0);
  for (size_t i = 0; i < g.weights.size(); ++i) result[first_weight + i] = as_torch(g.weights[i]);
  if (wait) {
    const at::Tensor before = states > 0 ? step.states[0] : at::zeros_like(h);
    sums->rows->add(*task,
                    {without_first(g.gates), copies.x ? step.x.clone() : step.x, copies.h ? before.clone() : before});
  }
  return result;
}

struct CellGradient : torch::autograd::Function<CellGradient> {
  // weights: themselves, or what stands for them.
  static List forward(AutogradContext* ctx, CellStep& step, const KeptSums::Found& kept, const at::Tensor& x,
                      const std::optional<at::Tensor>& h, const std::optional<at::Tensor>& c, at::TensorList weights) {
    const CellConstants& cell = library->constants(step.cell);
    ctx->set_materialize_grads(false);
    const LayerOutputs found = library->forward(call_of(step));
    List saved = {step.x};
    saved.insert(saved.end(), step.states.begin(), step.states.end());
    saved.insert(saved.end(), step.weights.begin(), step.weights.end());
    saved.insert(saved.end(), {without_first(found.y), as_torch(found.saved)});  // not h_n, which may be written
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["cell"] = std::string(cell.name);
    ctx->saved_data["states"] = !step.states.empty();
    if (kept.sums.defined()) ctx->saved_data["sums"] = kept.sums;
    ctx->saved_data["waits"] = !kept.stands.empty();
    ctx->saved_data["copies x"] = is_parameter(step.x);
    ctx->saved_data["copies h"] = !step.states.empty() && is_parameter(step.states[0]);
    if (cell.states == 1) return {without_first(found.h_n)};
    return {without_first(found.h_n), without_first(found.c_n)};
  }

  static List backward(AutogradContext* ctx, List from) {
    List saved = ctx->get_saved_variables();
    const int cell = library->find_cell(ctx->saved_data["cell"].toStringRef());
    const int64_t states = ctx->saved_data["states"].toBool() ? library->constants(cell).states : 0;
    const auto first = saved.begin() + 1, weights = first + states, last = saved.end() - 2;
    CellStep step{cell, saved[0], {first, weights}, {weights, last}};
    at::Tensor &h = last[0], &of_pass = last[1];
    std::vector<bool> wanted;  // edges: x, the states that are given, the weights
    for (int64_t i = 0; i < last - saved.begin(); ++i) wanted.push_back(ctx->needs_input_grad(i));
    const bool waits = ctx->saved_data["waits"].toBool();
    Sums* const sums = waits ? Boxed<Sums>::in(ctx->saved_data["sums"].toTensor()) : nullptr;
    const Copies copies = {ctx->saved_data["copies x"].toBool(), ctx->saved_data["copies h"].toBool()};
    List found;
    const bool alone = all_plain(from, saved);
    if (alone && !at::GradMode::is_enabled()) {
      found = by_kernel(step, h, of_pass, from, wanted, sums, task_of<CellGradient>(ctx), copies);
    } else if (alone && differentiates_twice(step)) {
      found = gradients_with_graph({step, h, of_pass, from, wanted});
    } else {
      found = long_way({step, h, of_pass, from, wanted});
    }
    TORCH_CHECK(found.size() == wanted.size(), "fusedrnn: ", found.size(), " gradients of ", wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (!wanted[i]) found[i] = at::Tensor();
    }
    List result(5);  // arguments: step, sums, x, h, c, the weights
    std::copy_n(found.begin(), 1 + states, result.begin() + 2);
    result.insert(result.end(), found.begin() + 1 + states, found.end());
    return result;
  }
};

}  // namespace

void connect_training(const Interface* with, LongWay way) {
  library = with;
  long_way = way;
}

const Interface& training_library() { return *library; }

LongWay way_of_python() { return long_way; }

List train(CellStep step, KeptSums& kept) {
  const CellConstants& cell = library->constants(step.cell);
  const auto differentiated = [](const at::Tensor& w) { return w.requires_grad(); };
  const bool one_product = cell.first == cell.gates && cell.parameters == 0;
  const bool adds_up =
      one_product && step.x.size(0) <= kFewRows &&
      std::all_of(step.weights.begin(), step.weights.end(), [](const at::Tensor& w) { return w.is_leaf(); }) &&
      std::any_of(step.weights.begin(), step.weights.end(), differentiated);
  const KeptSums::Found found = adds_up ? kept.find(cell, step) : KeptSums::Found();
  const auto state = [&](size_t i) {
    return i < step.states.size() ? std::optional<at::Tensor>(step.states[i]) : std::nullopt;
  };
  RECORD_FUNCTION("fusedrnn::cell", std::vector<c10::IValue>({step.x}));
  const List& weights = found.stands.empty() ? step.weights : found.stands;
  return CellGradient::apply(step, found, step.x, state(0), state(1), at::TensorList(weights));
}

}  // namespace fusedrnn
