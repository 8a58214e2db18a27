// Compiles the persistent kernels of one type: each file of them defines FUSEDRNN_TYPE and includes this.
#include "../cells/registry.h"
#include "../persistent/backward.h"
#include "../persistent/forward.h"
#include "machine.cuh"
#include "persistent.h"

namespace fusedrnn::persistent {
namespace {

extern __shared__ __align__(16) char shared_memory[];

#if defined(__CUDA_ARCH__)
constexpr int kMostBlocks = __CUDA_ARCH__ >= 900 ? 8 : 1;
#else
constexpr int kMostBlocks = 8;
#endif

// kClusters: the geometry of GPUs with clusters; without, of one block. Each is compiled only for the GPUs that it is
// of.
template <class Cell, class Products, int units, bool backward, bool clusters>
struct Fixed {
  static constexpr Geometry kGeometry = choose(loop_of<Cell>(Products::kMultiplier, units, backward), clusters ? 8 : 1);
  static constexpr bool kThere = kGeometry.tiles > 0;
  using Shape = FixedGeometry<kGeometry.blocks, kGeometry.tiles, kGeometry.parts, kGeometry.vectors, kGeometry.held>;
};

template <class Cell, class Products, class Shape, class Span, bool clusters>
__global__ void __launch_bounds__(threads(Shape{}), 1) persistent_loop(const __grid_constant__ Span span) {
#if defined(__CUDA_ARCH__)
  if constexpr (clusters == (kMostBlocks > 1)) {
    const GpuThread<Shape::blocks> m(shared_memory);
    if constexpr (std::is_same_v<Span, ForwardSpan<typename Products::T>>)
      forward_loop<Cell, Products>(m, Shape{}, span);
    else backward_loop<Cell, Products>(m, Shape{}, span);
  } else {
    __trap();  // compiled for another GPU: launch_products chooses by what the kernels were compiled for
  }
#endif
}

template <class Cell, class Products, int units, bool clusters, class Span>
cudaError_t launch_units(const Span& span, const Launch& where) {
  constexpr bool kBackward = std::is_same_v<Span, BackwardSpan<typename Products::T>>;
  using Of = Fixed<Cell, Products, units, kBackward, clusters>;
  if constexpr (Of::kThere) {
    using Shape = typename Of::Shape;
    constexpr int kBytes =
        kBackward ? backward_layout<Cell, Products>(Shape{}).bytes : forward_layout<Cell, Products>(Shape{}).bytes;
    const auto kernel = persistent_loop<Cell, Products, Shape, Span, clusters>;
    if (kBytes > 48 << 10) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config = {};
    const auto tiles = static_cast<unsigned>((span.steps.B + kSamples - 1) / kSamples);
    config.gridDim = dim3(tiles * Shape::blocks, static_cast<unsigned>(span.u.width / span.u.H));
    config.blockDim = dim3(threads(Shape{}));
    config.dynamicSmemBytes = kBytes;
    config.stream = where.stream;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = Shape::blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = Shape::blocks > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, span);
  }
  return cudaErrorNotSupported;
}

template <class Cell, class Products, class Span>
cudaError_t launch_products(const Span& span, const Launch& where) {
  const bool clusters = most_blocks(where.gpu) > 1;
  switch (units_for(span.u.H)) {
#define FUSEDRNN_UNITS(units)                                                \
  case units:                                                                \
    return clusters ? launch_units<Cell, Products, units, true>(span, where) \
                    : launch_units<Cell, Products, units, false>(span, where);
    FUSEDRNN_UNITS(64)
    FUSEDRNN_UNITS(128)
    FUSEDRNN_UNITS(256)
    FUSEDRNN_UNITS(512)
    FUSEDRNN_UNITS(1024)
#undef FUSEDRNN_UNITS
  }
  return cudaErrorNotSupported;
}

template <class Cell, template <class> class Span, class T>
cudaError_t launch_type(const Span<T>& span, const Launch& where) {
  if constexpr (!std::is_same_v<T, float>) return launch_products<Cell, HalfProducts<T>>(span, where);
  else if (where.multiplier == Multiplier::kTf32) return launch_products<Cell, Tf32Products>(span, where);
  else return launch_products<Cell, SplitProducts>(span, where);
}

template <class Cell, class Span>
constexpr auto launcher() -> cudaError_t (*)(const Span&, const Launch&) {
  if constexpr (is_persistent<Cell>) return launch_type<Cell>;
  else return nullptr;
}

template <class T, class... Cells>
constexpr Launchers<T> make_launchers(CellList<Cells...>) {
  return {{launcher<Cells, ForwardSpan<T>>()...}, {launcher<Cells, BackwardSpan<T>>()...}};
}

}  // namespace

template <class T>
const Launchers<T>& launchers() {
  static constexpr Launchers<T> kLaunchers = make_launchers<T>(Registry{});
  return kLaunchers;
}
template const Launchers<FUSEDRNN_TYPE>& launchers<FUSEDRNN_TYPE>();

}  // namespace fusedrnn::persistent
