// The stepwise driver on CUDA: every body of step*.h as a kernel, one thread an element, on the stream of the call.
#include <cuda_runtime.h>

#include "../cells/registry.h"
#include "../stepwise/loop_backward.h"
#include "../stepwise/loop_forward.h"
#include "device.h"
#include "element.cuh"
#include "persistent.h"

namespace fusedrnn {

namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 65535;  // of a grid's y

constexpr int kFewBlocks = 4;  // of a processor at a time, for which a kernel may take 128 registers

// Whether a body holds more than 64 registers: those of cells of many states.
template <class Body>
constexpr bool is_wide = false;
template <class Cell, class S, class T, bool kProjected>
constexpr bool is_wide<BackwardStep<Cell, S, T, kProjected>> = Cell::kStates > 2;

template <class Body>
__global__ void __launch_bounds__(kThreads, is_wide<Body> ? kFewBlocks : 0)
    each_element(const __grid_constant__ Body body, int64_t rows, int64_t columns) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) body(blockIdx.z, row, column);
}

// The threads of a block, for one row.
struct RowBlock {
  __device__ int64_t begin() const { return threadIdx.x; }
  __device__ int64_t step() const { return kThreads; }
  // Of all threads, in the same order for each.
  template <class S>
  __device__ S sum(S v) const {
    constexpr int kWarps = kThreads / 32;
    __shared__ S of_warp[kWarps];
    for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
    __syncthreads();  // the sum before this one has been read
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
    __syncthreads();
    S total = S(0);
    for (int warp = 0; warp < kWarps; ++warp) total += of_warp[warp];
    return total;
  }
};

template <class Body>
__global__ void __launch_bounds__(kThreads, kFewBlocks) each_row(const __grid_constant__ Body body, int64_t rows) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) body(RowBlock(), blockIdx.y, row);
}

struct Cuda {
  static constexpr int64_t kProjectionBytes = int64_t{64} << 20;

  const CudaCall& call;
  cudaError_t error = cudaSuccess;

  template <class Body>
  void each(int slots, int64_t rows, int64_t columns, const Body& body) {
    if (rows == 0 || columns == 0 || error != cudaSuccess) return;
    const dim3 grid(static_cast<unsigned>((columns + kThreads - 1) / kThreads),
                    static_cast<unsigned>(std::min(rows, kMaxBlocks)), slots);
    each_element<<<grid, kThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(body, rows, columns);
    error = cudaGetLastError();
  }

  template <class Body>
  void each_block(int slots, int64_t rows, const Body& body) {
    if (rows == 0 || error != cudaSuccess) return;
    const dim3 grid(static_cast<unsigned>(std::min(rows, kMaxBlocks)), slots);
    each_row<<<grid, kThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(body, rows);
    error = cudaGetLastError();
  }

  template <class T>
  persistent::Multiplier multiplier() const {
    using persistent::Multiplier;
    return sizeof(T) == 2 ? Multiplier::kHalves : call.tf32 ? Multiplier::kTf32 : Multiplier::kSplit;
  }
  template <class Pass>
  bool persists(const typename Pass::Problem& p) const {
    constexpr bool kBackward = std::is_same_v<typename Pass::Problem, BackwardProblem>;
    const auto loop = persistent::loop_of<typename Pass::Cell>(multiplier<typename Pass::T>(),
                                                               persistent::units_for(p.size.H), kBackward);
    return call.persistent && !persistent::refusal(loop, call.gpu);
  }
  template <class Cell, template <class> class Span, class T>
  void run_steps(const Span<T>& span) {
    const persistent::Launch where = {static_cast<cudaStream_t>(call.stream), multiplier<T>(), call.gpu};
    if (error != cudaSuccess) return;
    error = persistent::launch<Cell, T>(span, where);
    if (error != cudaSuccess) cudaGetLastError();  // else the next launch would be told of it
  }

  void product(const Product& p) {
    if (error == cudaSuccess) call.product(p, call.context);
  }
};

template <class Pass>
const char* run(const typename Pass::Problem& p, const CudaCall& call) {
  Cuda device{call};
  Pass::run(p, call.memory, device);
  return device.error == cudaSuccess ? nullptr : cudaGetErrorString(device.error);
}

template <class Pass>
bool persists(const typename Pass::Problem& p, const CudaCall& call) {
  CudaCall asked = call;
  asked.persistent = true;
  return Pass::can_persist(p) && Cuda{asked}.template persists<Pass>(p);
}

// Numbers that are not negative are ordered as their bits are; one that is none is above them all.
__device__ void raise(float& to, float value) {
  atomicMax(reinterpret_cast<unsigned*>(&to), __float_as_uint(value) & 0x7fffffffu);
}

template <class E>
struct Compare {
  const E *a, *b;
  int64_t stride;
  Largest* largest;
  __device__ void operator()(int, int64_t row, int64_t column) const {
    const auto value = static_cast<float>(widen(a[row * stride + column]));
    raise(largest->value, value);
    raise(largest->difference, value - static_cast<float>(widen(b[row * stride + column])));
  }
};

template <class E>
const char* compare(const Output& output, const void* other, Largest* largest, const CudaCall& call) {
  Cuda device{call};
  device.each(1, output.rows, output.columns,
              Compare<E>{static_cast<const E*>(*output.at), static_cast<const E*>(other), output.stride, largest});
  return device.error == cudaSuccess ? nullptr : cudaGetErrorString(device.error);
}

template <class Pass>
int64_t bytes(const typename Pass::Problem& p) {
  return Pass::template bytes<Cuda>(p);
}

int capability() {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, each_element<Compare<float>>);
  if (error != cudaSuccess) cudaGetLastError();  // it is told here
  return error == cudaSuccess ? attributes.ptxVersion : 0;
}

// Of each cell a row of the four types.
template <template <class, class> class Pass, class Cell>
struct Row {
  using Problem = typename Pass<Cell, float>::Problem;
  using Bytes = int64_t (*)(const Problem&);
  using Run = const char* (*)(const Problem&, const CudaCall&);
  using Persists = bool (*)(const Problem&, const CudaCall&);

  template <class Function, class Of>
  static constexpr void fill(Function (&row)[kDTypes], const Of& of) {
    row[static_cast<int>(DType::kFloat32)] = of(Type<Pass<Cell, float>>());
    row[static_cast<int>(DType::kFloat64)] = of(Type<Pass<Cell, double>>());
    row[static_cast<int>(DType::kBFloat16)] = of(Type<Pass<Cell, __nv_bfloat16>>());
    row[static_cast<int>(DType::kFloat16)] = of(Type<Pass<Cell, __half>>());
  }
  static constexpr void fill(Bytes (&bytes_row)[kDTypes], Run (&run_row)[kDTypes], Persists (&persists_row)[kDTypes]) {
    fill(bytes_row, [](auto type) { return bytes<typename decltype(type)::Of>; });
    fill(run_row, [](auto type) { return run<typename decltype(type)::Of>; });
    fill(persists_row, [](auto type) { return persists<typename decltype(type)::Of>; });
  }

  template <class T>
  struct Type {
    using Of = T;
  };
};

template <class... Cells>
constexpr CudaTable make_table(CellList<Cells...>) {
  CudaTable table = {};
  int cell = 0;
  const auto add = [&](auto forward, auto backward) {
    decltype(forward)::fill(table.forward_bytes[cell], table.forward[cell], table.forward_persists[cell]);
    decltype(backward)::fill(table.backward_bytes[cell], table.backward[cell], table.backward_persists[cell]);
    ++cell;
  };
  (add(Row<StepwiseForward, Cells>(), Row<StepwiseBackward, Cells>()), ...);
  table.compare[static_cast<int>(DType::kFloat32)] = compare<float>;
  table.compare[static_cast<int>(DType::kFloat64)] = compare<double>;
  table.compare[static_cast<int>(DType::kBFloat16)] = compare<__nv_bfloat16>;
  table.compare[static_cast<int>(DType::kFloat16)] = compare<__half>;
  table.capability = capability;
  return table;
}

template <class... Cells>
constexpr bool is_whole(const CudaTable& table, CellList<Cells...>) {
  bool whole = table.capability;
  for (int dtype = 0; dtype < kDTypes; ++dtype) {
    whole = whole && table.compare[dtype];
    for (size_t cell = 0; cell < sizeof...(Cells); ++cell) {
      whole = whole && table.forward_bytes[cell][dtype] && table.backward_bytes[cell][dtype] &&
              table.forward[cell][dtype] && table.backward[cell][dtype] && table.forward_persists[cell][dtype] &&
              table.backward_persists[cell][dtype];
    }
  }
  return whole;
}

constexpr CudaTable kTable = make_table(Registry{});
static_assert(is_whole(kTable, Registry{}));

}  // namespace

extern const CudaTable kCudaTable = kTable;

}  // namespace fusedrnn
