// The ops: schemas, and their arguments from torch's stack. The passes are in passes.cpp, the checks in layer.cpp; no
// torch below these.
//
//   layer_forward   one layer, all its directions: y, h_n, c_n and what backward needs (`saved`, empty if not asked)
//   layer_backward  its hand-derived gradients
//
// float16 on the CPU is computed by the kernels of float32. With `scales`, s_ih, s_hh[, s_hr] for each direction, the
// matrices are int8: row r of one stands for scale[r] times its numbers. With an empty list they are bfloat16. Both for
// inference on the CPU, everything else in float32.
// weights: for each direction w_ih, w_hh[, b_ih, b_hh][, w_hr], as torch.nn lays them out. x is [T, B, I], or [N, I]
// with batch_sizes (a PackedSequence's). Outputs never alias inputs or one another.
#include "target.h"

#include <torch/csrc/stable/library.h>

#include "passes.h"

namespace fusedrnn {
namespace {

// The arguments of an op as they lie on torch's stack, taken in the order of the schema: all of them, for they are
// given up to the kernel. Then their place is for the results.
class Stack {
 public:
  explicit Stack(StableIValue* stack) : next_(stack), result_(stack) {}

  Tensor tensor() { return Tensor::take(to<AtenTensorHandle>(*next_++)); }
  OptionalTensor optional() {
    const std::unique_ptr<StableIValue> given(to<StableIValue*>(*next_++));
    if (!given) return std::nullopt;
    return Tensor::take(to<AtenTensorHandle>(*given));
  }
  Tensors tensors() { return list(*next_++); }
  std::optional<Tensors> optional_tensors() {
    const std::unique_ptr<StableIValue> given(to<StableIValue*>(*next_++));
    return given ? std::optional<Tensors>(list(*given)) : std::nullopt;
  }
  std::string text() {
    const auto given = to<StringHandle>(*next_++);
    const std::unique_ptr<StringOpaque, void (*)(StringHandle)> held(given,
                                                                     [](StringHandle s) { torch_delete_string(s); });
    const char* text = "";
    size_t size = 0;
    read(torch_string_length(given, &size));
    read(torch_string_c_str(given, &text));
    return std::string(text, size);
  }
  bool flag() { return to<bool>(*next_++); }
  int64_t integer() { return to<int64_t>(*next_++); }
  double number() { return to<double>(*next_++); }

  void give(const Tensor& t) { *result_++ = handed_over(t); }
  void give(const Tensors& list) {
    StableListHandle made = nullptr;
    const auto taken = [](AOTITorchError error) { done(error, "fusedrnn: torch takes no result"); };
    taken(torch_new_list_reserve_size(list.size(), &made));
    for (const Tensor& t : list) taken(torch_list_push_back(made, handed_over(t)));
    *result_++ = torch::stable::detail::from(made);
  }

 private:
  template <class T>
  static T to(StableIValue value) {
    return torch::stable::detail::to<T>(value);
  }
  static Tensors list(StableIValue value) {
    const auto list = to<StableListHandle>(value);
    const std::unique_ptr<StableListOpaque, void (*)(StableListHandle)> held(
        list, [](StableListHandle l) { torch_delete_list(l); });
    size_t size = 0;
    read(torch_list_size(list, &size));
    Tensors result(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      read(torch_list_get_item(list, i, &item));
      result[i] = Tensor::take(to<AtenTensorHandle>(item));
    }
    return result;
  }
  static void read(AOTITorchError error) { done(error, "fusedrnn: torch does not tell an argument"); }
  static StableIValue handed_over(const Tensor& t) { return torch::stable::detail::from(t.new_handle()); }

  StableIValue *next_, *result_;
};

// (The members of a list in braces are read in their order.)
LayerArguments read_arguments(Stack& given) {
  return {given.tensor(), given.optional(), given.optional(), given.optional(), given.tensors()};
}

void layer_forward(StableIValue* stack, uint64_t, uint64_t) {
  Stack given(stack);
  LayerArguments arguments = read_arguments(given);
  const std::string cell = given.text();
  arguments.cell = cell;
  arguments.bidirectional = given.flag();
  const bool save = given.flag();
  arguments.noise = {given.optional(), given.optional(), given.optional()};
  arguments.scales = given.optional_tensors();
  const LayerOutputs found = forward_pass(arguments, save);
  for (const Tensor& t : {found.y, found.h_n, found.c_n, found.saved}) given.give(t);
}

void layer_backward(StableIValue* stack, uint64_t, uint64_t) {
  Stack given(stack);
  const Cotangents from{given.optional(), given.optional(), given.optional(), given.optional()};
  LayerArguments arguments = read_arguments(given);
  const Tensor y = given.tensor(), saved = given.tensor();
  const std::string cell = given.text();
  arguments.cell = cell;
  arguments.bidirectional = given.flag();
  const Needs need{given.flag(), given.flag(), given.flag(), given.flag()};
  const Limits limits{given.integer(), given.number(), given.flag()};
  arguments.noise = {given.optional(), given.optional(), given.optional()};
  const LayerGradients found = backward_pass(arguments, from, y, saved, need, limits);
  for (const Tensor& t : {found.x, found.h0, found.c0}) given.give(t);
  given.give(found.weights);
  for (const Tensor& t : {found.gates, found.h, found.norms}) given.give(t);
}

// The kernels take their arguments from the stack, where torch has them: the schema is the only list of them in C++.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("layer_forward", &layer_forward);
  m.impl("layer_backward", &layer_backward);
}

}  // namespace

STABLE_TORCH_LIBRARY(fusedrnn, m) {
  m.def(
      "layer_forward(Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, str cell, "
      "bool bidirectional, bool save, Tensor? mask_h=None, Tensor? keep_h=None, Tensor? keep_c=None, "
      "Tensor[]? scales=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor? batch_sizes, Tensor? h0, "
      "Tensor? c0, Tensor[] weights, Tensor y, Tensor saved, str cell, bool bidirectional, bool need_x, "
      "bool need_weights, bool need_gates=False, bool need_norms=False, int bptt_steps=0, float clip=0., "
      "bool clip_by_norm=False, Tensor? mask_h=None, Tensor? keep_h=None, Tensor? keep_c=None) "
      "-> (Tensor, Tensor, Tensor, Tensor[], Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { implement(m); }

#if defined(FUSEDRNN_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) { implement(m); }
#endif

}  // namespace fusedrnn
