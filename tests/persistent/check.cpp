// The persistent kernels (csrc/persistent) on the emulated GPU, without torch:
//
//   check loops [seed ...]   both time loops against a plain loop in double: every cell, type and geometry
//   check fragments          the emulated mma.sync against CUTLASS's layouts of its fragments
//   check fault NAME         a kernel with that fault; prints what the emulator says of it
//
// The exit status is 1 if something differs. FEW, defined, leaves cells and types out and stops at the first
// difference, for mutants.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cells/registry.h"
#include "../../csrc/persistent/backward.h"
#include "../../csrc/persistent/emulator.h"
#include "../../csrc/persistent/forward.h"

namespace fusedrnn {

// 16-bit types without torch.
using Fp16 = _Float16;

float widened_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

struct Bfloat {
  uint16_t bits;
};
template <>
struct Element<Bfloat> {
  static constexpr DType kDType = DType::kBFloat16;
  static float widen(Bfloat v) { return widened_bf16(v.bits); }
  static Bfloat narrow(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};
template <>
struct Element<Fp16> {
  static constexpr DType kDType = DType::kFloat16;
  static float widen(Fp16 v) { return static_cast<float>(v); }
  static Fp16 narrow(float v) { return static_cast<Fp16>(v); }
};

namespace {

using namespace persistent;

struct Case {
  int H, B, T, slots;
  bool ragged, bias;
  Geometry s;
};

// Numbers that look like weights or states, exact in T.
template <class T>
std::vector<T> numbers(std::mt19937& random, int64_t n, double scale) {
  std::normal_distribution<float> normal(0, static_cast<float>(scale));
  std::vector<T> all(n);
  for (T& v : all) v = narrow<T>(normal(random));
  return all;
}
template <class T>
double as_double(T v) {
  return static_cast<double>(widen(v));
}

double worst_of_all = 0;
template <class A, class B>
bool close(const char* what, const std::vector<A>& found, const std::vector<B>& expected, double tolerance) {
  double worst = 0, scale = 1;
  bool same = true;
  for (size_t i = 0; i < found.size(); ++i) {
    const double a = as_double(found[i]), b = static_cast<double>(expected[i]);
    if (!(std::fabs(a - b) <= 1e30)) same = false;  // NaN too: nobody wrote it
    worst = std::max(worst, std::fabs(a - b));
    scale = std::max(scale, std::fabs(b));
  }
  worst_of_all = std::max(worst_of_all, worst / scale / tolerance);
  if (same && worst <= tolerance * scale) return true;
  std::printf("  %s: off by %g of %g\n", what, worst, scale);
  return false;
}

// The rows of each step: dense, or shorter and shorter.
struct Rows {
  std::vector<int32_t> active;
  std::vector<int64_t> offset;
  int64_t N = 0;
  explicit Rows(const Case& c) {
    for (int t = 0; t < c.T; ++t) {
      active.push_back(c.ragged ? std::max(1, c.B - c.B * t / c.T - (t > 0)) : c.B);
      offset.push_back(N);
      N += active.back();
    }
  }
};

template <class Cell, class Products>
bool run_loops(const Case& c, uint64_t seed, double tolerance) {
  using T = typename Products::T;
  constexpr int G = Cell::kGates, kKept = Cell::kSaved + Cell::kStates - 1, kParameters = Cell::kParameters;
  constexpr int kFactors = G + Cell::kSplit, kBlocks = kFactors + kParameters;
  const int H = c.H, B = c.B, D = c.slots;
  const Rows rows(c);
  const int64_t N = rows.N, stride = std::max(kKept * H, 1);
  std::mt19937 random(static_cast<uint32_t>(seed * 7919 + H * 31 + B));
  const auto w = numbers<T>(random, int64_t{D} * G * H * H, 1 / std::sqrt(H)), b_ih = numbers<T>(random, D * G * H, .3),
             b_hh = numbers<T>(random, D * G * H, .3), h0 = numbers<T>(random, D * B * H, .5),
             c0 = numbers<T>(random, D * B * H, .5), dy = numbers<T>(random, N * D * H, 1),
             dc_rows = numbers<T>(random, N * D * H, .3), w_unit = numbers<T>(random, D * kParameters * H, .5);
  const auto x = numbers<float>(random, int64_t{D} * N * G * H, 1);
  const auto time = [&](int slot, int i) { return slot ? c.T - 1 - i : i; };
  const auto parameters_of = [&](int slot, int j) {
    return UnitParameters<Cell, double>::of([&](int k) { return as_double(w_unit[(slot * kParameters + k) * H + j]); });
  };

  // ---- forward, in two spans
  const float nan = std::nanf("");
  std::vector<T> y(N * D * H, narrow<T>(nan)), operand(h0);
  std::vector<float> h, cs, saved(D * N * stride, nan);
  for (const T v : h0) h.push_back(widen(v));
  for (const T v : c0) cs.push_back(widen(v));
  ForwardSpan<T> f = {};
  f.u.B = B, f.u.H = f.u.R = H, f.u.width = D * H, f.u.saved_stride = stride;
  f.u.operand = operand.data(), f.u.h = sizeof(T) == 2 ? h.data() : nullptr, f.u.c = cs.data();
  f.x = x.data(), f.x_stride = N * G * H, f.w_hh = w.data();
  for (int s = 0; s < D; ++s) {
    if (c.bias) f.u.b_ih[s] = b_ih.data() + s * G * H, f.u.b_hh[s] = b_hh.data() + s * G * H;
    f.u.w_unit[s] = w_unit.data() + s * kParameters * H;
    f.u.y[s] = y.data() + s * H;
    f.u.saved[s] = saved.data() + s * N * stride;
  }
  const int clusters = (B + kSamples - 1) / kSamples;
  const int cuts[] = {0, c.T / 2, c.T};
  for (int part = 0; part < 2; ++part) {
    if (cuts[part] == cuts[part + 1]) continue;
    f.steps = {cuts[part], cuts[part + 1], c.T, B, c.ragged ? rows.active.data() : nullptr, {}};
    for (int s = 0; s < D; ++s) f.steps.first_row[s] = rows.offset[time(s, cuts[part])];
    emulate({clusters, D, c.s.blocks, threads(c.s), forward_layout<Cell, Products>(c.s).bytes, seed},
            [&](EmulatedThread& m) { forward_loop<Cell, Products>(m, c.s, f); });
  }

  using V = double;
  std::vector<double> want_y(N * D * H), want_h(D * B * H), want_c(D * B * H), want_saved(D * N * stride);
  for (int s = 0; s < D; ++s) {
    for (int b = 0; b < B; ++b) {
      std::vector<double> now(H), cell(H);
      for (int j = 0; j < H; ++j)
        now[j] = as_double(h0[(s * B + b) * H + j]), cell[j] = as_double(c0[(s * B + b) * H + j]);
      for (int i = 0; i < c.T; ++i) {
        const int t = time(s, i);
        if (b >= rows.active[t]) continue;
        const int64_t n = rows.offset[t] + b;
        std::vector<double> next(H);
        for (int j = 0; j < H; ++j) {
          Values<V, G> of_x, of_h;
          for (int g = 0; g < G; ++g) {
            of_x[g] = x[(s * N + n) * G * H + g * H + j] + (c.bias ? as_double(b_ih[s * G * H + g * H + j]) : 0);
            of_h[g] = c.bias ? as_double(b_hh[s * G * H + g * H + j]) : 0;
            for (int k = 0; k < H; ++k) {
              of_h[g] += as_double(w[(int64_t{s} * G * H + g * H + j) * H + k]) *
                         as_double(narrow<T>(static_cast<float>(now[k])));
            }
          }
          Values<V, Cell::kStates> state;
          state[0] = now[j];
          if constexpr (Cell::kStates == 2) state[1] = cell[j];
          Values<V, Cell::kSaved> values;
          forward_step<Cell>(of_x, of_h, parameters_of(s, j), state, values);
          next[j] = state[0];
          double* const kept = &want_saved[(s * N + n) * stride + j];
          for (int k = 0; k < Cell::kSaved; ++k) kept[k * H] = values[k];
          if constexpr (Cell::kStates == 2) kept[Cell::kSaved * H] = cell[j] = state[1];
        }
        now = next;
        for (int j = 0; j < H; ++j) want_y[n * D * H + s * H + j] = now[j];
      }
      for (int j = 0; j < H; ++j) want_h[(s * B + b) * H + j] = now[j], want_c[(s * B + b) * H + j] = cell[j];
    }
  }
  bool good = close("y", y, want_y, tolerance) && close("h_n", operand, want_h, tolerance);
  if (sizeof(T) == 2) good = close("h", h, want_h, tolerance) && good;
  if constexpr (Cell::kStates == 2) good = close("c_n", cs, want_c, tolerance) && good;
  if constexpr (kKept > 0) good = close("saved", saved, want_saved, tolerance) && good;
  if (!good) return false;

  // ---- backward, from what forward has left
  std::vector<T> dg(D * N * kBlocks * H, narrow<T>(nan)), before(D * N * H, narrow<T>(nan));
  auto dh = numbers<float>(random, D * B * H, 1), dc = numbers<float>(random, D * B * H, 1);
  const auto dh_n = dh, dc_n = dc;
  BackwardSpan<T> g = {};
  g.steps = {0, c.T, c.T, B, c.ragged ? rows.active.data() : nullptr, {}};
  g.u.B = B, g.u.H = g.u.R = H, g.u.width = D * H, g.u.saved_stride = stride;
  g.u.dh = dh.data(), g.u.dc = dc.data();
  g.dy = {dy.data(), c.ragged ? -1 : int64_t{B} * D * H, D * H};
  g.dc = {dc_rows.data(), c.ragged ? -1 : int64_t{B} * D * H, D * H};
  g.w_hh = w.data(), g.clip = c.bias ? 0 : 0.9f, g.bptt_steps = c.bias ? 0 : 2;
  for (int s = 0; s < D; ++s) {
    g.steps.first_row[s] = rows.offset[time(s, c.T - 1)];
    g.u.h0[s] = h0.data() + s * B * H, g.u.c0[s] = c0.data() + s * B * H;
    g.u.w_unit[s] = w_unit.data() + s * kParameters * H;
    g.u.y[s] = y.data() + s * H, g.u.saved[s] = saved.data() + s * N * stride;
    g.u.dg[s] = dg.data() + s * N * kBlocks * H, g.u.before[s] = before.data() + s * N * H;
  }
  emulate({clusters, D, c.s.blocks, threads(c.s), backward_layout<Cell, Products>(c.s).bytes, seed},
          [&](EmulatedThread& m) { backward_loop<Cell, Products>(m, c.s, g); });

  std::vector<double> want_dg(dg.size()), want_before(before.size()), want_dh(dh.size()), want_dc(dc.size());
  for (int s = 0; s < D; ++s) {
    for (int b = 0; b < B; ++b) {
      std::vector<double> d(H), e(H);
      for (int j = 0; j < H; ++j) d[j] = dh_n[(s * B + b) * H + j], e[j] = dc_n[(s * B + b) * H + j];
      for (int i = c.T - 1; i >= 0; --i) {
        const int t = time(s, i);
        if (b >= rows.active[t]) continue;
        const int64_t n = rows.offset[t] + b;
        const bool carried = i > 0 && b < rows.active[time(s, i - 1)];
        const int64_t last = carried ? rows.offset[time(s, i - 1)] + b : 0;
        std::vector<double> gates(G * H), direct(H);
        for (int j = 0; j < H; ++j) {
          const int64_t state = (s * B + b) * H + j;
          Values<V, Cell::kSaved> values;
          for (int k = 0; k < Cell::kSaved; ++k) values[k] = saved[(s * N + n) * stride + k * H + j];
          Values<V, Cell::kStates> previous, current, gradient;
          previous[0] = as_double(carried ? y[last * D * H + s * H + j] : h0[state]);
          current[0] = as_double(y[n * D * H + s * H + j]);
          gradient[0] = d[j] + as_double(dy[n * D * H + s * H + j]);
          if constexpr (Cell::kStates == 2) {
            previous[1] = carried ? saved[(s * N + last) * stride + Cell::kSaved * H + j] : as_double(c0[state]);
            current[1] = saved[(s * N + n) * stride + Cell::kSaved * H + j];
            gradient[1] = e[j] + as_double(dc_rows[n * D * H + s * H + j]);
          }
          Values<V, G> dx, drec;
          auto parameters = parameters_of(s, j);
          parameters.backward(values, previous, current, gradient, dx, drec);
          double* const to = &want_dg[(s * N + n) * kBlocks * H + j];
          for (int k = 0; k < G; ++k)
            to[k * H] = drec[k], gates[k * H + j] = as_double(narrow<T>(static_cast<float>(drec[k])));
          for (int k = 0; k < Cell::kSplit; ++k) to[(G + k) * H] = dx[G - Cell::kSplit + k];
          for (int k = 0; k < kParameters; ++k) to[(kFactors + k) * H] = parameters.gradient[k];
          direct[j] = gradient[0];
          if constexpr (Cell::kStates == 2) e[j] = gradient[1];
          want_before[(s * N + n) * H + j] = previous[0];
        }
        const bool severed = carried && g.bptt_steps > 0 && std::max(t, time(s, i - 1)) % g.bptt_steps == 0;
        const double limit = g.clip;
        const auto sent = [&](double v) { return severed ? 0 : limit == 0 ? v : std::min(std::max(v, -limit), limit); };
        for (int j = 0; j < H; ++j) {
          double sum = direct[j];
          for (int k = 0; k < G * H; ++k) sum += gates[k] * as_double(w[(int64_t{s} * G * H + k) * H + j]);
          d[j] = sent(sum);
          if (Cell::kStates == 2) e[j] = sent(e[j]);
        }
      }
      for (int j = 0; j < H; ++j) want_dh[(s * B + b) * H + j] = d[j], want_dc[(s * B + b) * H + j] = e[j];
    }
  }
  good = close("dg", dg, want_dg, tolerance) && close("before", before, want_before, tolerance) &&
         close("dh", dh, want_dh, tolerance);
  if constexpr (Cell::kStates == 2) good = close("dc", dc, want_dc, tolerance) && good;
  return good;
}

const Case kCases[] = {
    // H, B, T, slots, ragged, bias, {blocks, tiles, parts, vectors, held}
    {5, 3, 4, 1, false, true, {1, 1, 1, 2, 2}},   {16, 8, 3, 1, false, true, {1, 1, 1, 1, 1}},
    {20, 11, 5, 2, true, true, {1, 2, 2, 1, 0}},  {33, 9, 5, 2, true, false, {2, 2, 1, 3, 2}},
    {48, 2, 4, 1, false, false, {1, 3, 4, 1, 1}}, {48, 10, 6, 2, true, true, {4, 1, 4, 1, 0}},
    {40, 1, 5, 1, true, false, {8, 1, 2, 2, 1}},  {64, 17, 3, 1, true, false, {2, 2, 2, 2, 1}},
    {30, 4, 1, 2, false, true, {2, 1, 1, 2, 0}},  {65, 9, 3, 2, true, true, {1, 8, 1, 4, 3}},
#if !defined(FEW)
    {250, 9, 2, 1, true, true, {4, 4, 2, 4, 4}},  {256, 3, 2, 2, false, true, {8, 2, 4, 2, 2}},
    {512, 9, 2, 1, false, true, {8, 4, 2, 8, 4}},
#endif
};

template <class Cell, class Products>
int run_cases(const char* type, double tolerance, uint64_t seed) {
  int bad = 0;
  for (Case c : kCases) {
    if (c.H > 65 && seed != 1) continue;  // long
    // Vectors of 4 registers hold half as many elements of 4 bytes.
    if (Products::kPerRegister == 1) c.s.vectors *= 2, c.s.held *= 2;
    try {
      if (run_loops<Cell, Products>(c, seed, tolerance)) continue;
    } catch (const std::exception& error) {
      std::printf("  %s\n", error.what());
    }
    std::printf("%s %s H %d B %d T %d blocks %d tiles %d parts %d vectors %d held %d seed %d\n", Cell::kName, type, c.H,
                c.B, c.T, c.s.blocks, c.s.tiles, c.s.parts, c.s.vectors, c.s.held, static_cast<int>(seed));
    ++bad;
#if defined(FEW)
    std::fflush(stdout);
    std::_Exit(1);
#endif
  }
  return bad;
}

template <class Cell>
int run_types(uint64_t seed) {
  int bad = run_cases<Cell, HalfProducts<Bfloat>>("bfloat16", 0.04, seed);
#if !defined(FEW)
  bad += run_cases<Cell, HalfProducts<Fp16>>("float16", 0.005, seed);
  bad += run_cases<Cell, Tf32Products>("tf32", 0.005, seed);
#endif
  return bad + run_cases<Cell, SplitProducts>("float32", 4e-6, seed);
}

template <class... Cells>
int run_cells(uint64_t seed, CellList<Cells...>) {
  int bad = 0;
  const auto run = [&](auto cell) {
    using Cell = decltype(cell);
    if constexpr (is_persistent<Cell>) bad += run_types<Cell>(seed);
  };
  (run(Cells()), ...);
  return bad;
}

// ---- fragments -------------------------------------------------------------------------------------------------

// CUTLASS, include/cute/atom/mma_traits_sm80.hpp: the place of value v of thread t in the column-major matrix, of A as
// [16][k], of B as [8][k], of C as [16][8].
int a16(int t, int v) { return t % 4 * 32 + t / 4 + v % 2 * 16 + v / 2 % 2 * 8 + v / 4 * 128; }
int b16(int t, int v) { return t % 4 * 16 + t / 4 + v % 2 * 8 + v / 2 * 64; }
int a8(int t, int v) { return t % 4 * 16 + t / 4 + v % 2 * 8 + v / 2 * 64; }
int b8(int t, int v) { return t % 4 * 8 + t / 4 + v * 32; }
int c_of(int t, int v) { return t % 4 * 32 + t / 4 + v % 2 * 16 + v / 2 * 8; }

int check_fragments() {
  int bad = 0;
  std::mt19937 random(1);
  for (const int depth : {16, 8}) {
    std::vector<float> a(16 * depth), b(8 * depth), c(16 * 8), result(16 * 8);
    for (auto* all : {&a, &b, &c}) {
      for (float& v : *all) v = static_cast<float>(static_cast<int>(random() % 15) - 7);
    }
    emulate({1, 1, 1, kLanes, 16, 1}, [&](EmulatedThread& m) {
      const int t = m.thread();
      float sums[4];
      uint32_t of_a[4], of_b[2];
      for (int v = 0; v < 4; ++v) sums[v] = c[c_of(t, v)];
      if (depth == 16) {
        const auto pair = [](float low, float high) {
          const Bfloat both[2] = {narrow<Bfloat>(low), narrow<Bfloat>(high)};
          uint32_t bits;
          std::memcpy(&bits, both, sizeof bits);
          return bits;
        };
        for (int r = 0; r < 4; ++r) of_a[r] = pair(a[a16(t, 2 * r)], a[a16(t, 2 * r + 1)]);
        for (int r = 0; r < 2; ++r) of_b[r] = pair(b[b16(t, 2 * r)], b[b16(t, 2 * r + 1)]);
        m.multiply_halves(sums, of_a, of_b[0], of_b[1], Bfloat());
      } else {
        for (int r = 0; r < 4; ++r) of_a[r] = bits_of(a[a8(t, r)]);
        for (int r = 0; r < 2; ++r) of_b[r] = bits_of(b[b8(t, r)]);
        m.multiply_tf32(sums, of_a, of_b[0], of_b[1]);
      }
      for (int v = 0; v < 4; ++v) result[c_of(t, v)] = sums[v];
    });
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float sum = c[row + 16 * column];
        for (int k = 0; k < depth; ++k) sum += a[row + 16 * k] * b[column + 8 * k];
        bad += sum != result[row + 16 * column];
      }
    }
  }
  return bad;
}

// ---- faults ----------------------------------------------------------------------------------------------------

using Kernel = std::function<void(EmulatedThread&)>;
struct Fault {
  const char* name;
  int blocks, threads;
  Kernel kernel;
};

const Fault kFaults[] = {
    {"none", 2, 64,
     [](EmulatedThread& m) {
       const auto words = m.shared<float>(0);
       m.store(words + m.thread(), 1.0f);
       m.cluster_arrive(), m.cluster_wait();
       m.load(words + (m.thread() + 1) % 64);
     }},
    {"read after write", 1, 64,
     [](EmulatedThread& m) {
       m.store(m.shared<float>(0) + m.thread(), 1.0f);
       if (m.thread() == 0) m.load(m.shared<float>(0));
       m.cluster_wait();
       if (m.thread() == 1) m.store(m.shared<float>(0), 2.0f);
       if (m.thread() == 2) m.load(m.shared<float>(0));
     }},
    {"write after read", 1, 64,
     [](EmulatedThread& m) {
       if (m.thread() == 0) m.store(m.shared<float>(0), 1.0f);
       m.cluster_wait();
       if (m.thread() == 1) m.load(m.shared<float>(0));
       if (m.thread() == 40) m.store(m.shared<float>(0), 2.0f);
     }},
    {"write after write", 1, 64, [](EmulatedThread& m) { m.store(m.shared<float>(0), 1.0f); }},
    {"half a word", 1, 32,
     [](EmulatedThread& m) {
       if (m.thread() == 0) m.store(m.shared<uint32_t>(0), uint32_t{1});
       if (m.thread() == 1) m.store(m.shared<uint16_t>(2), uint16_t{1});
     }},
    {"another block", 2, 32,
     [](EmulatedThread& m) {  // a barrier of the block orders nothing of another
       if (m.thread() == 0 && m.rank() == 0) m.store_everywhere(m.shared<float>(0), 1.0f);
       m.group_sync(0, 32);
       if (m.thread() == 0 && m.rank() == 1) m.load(m.shared<float>(0));
     }},
    {"between arrive and wait", 2, 32,
     [](EmulatedThread& m) {
       m.cluster_arrive();
       if (m.thread() == 0 && m.rank() == 0) m.store_everywhere(m.shared<float>(0), 1.0f);
       m.cluster_wait();
       if (m.thread() == 1) m.load(m.shared<float>(0));
     }},
    {"another group", 1, 64,
     [](EmulatedThread& m) {
       m.store(m.shared<float>(0) + m.thread(), 1.0f);
       m.group_sync(m.thread() / 32, 32);
       m.load(m.shared<float>(0) + (m.thread() + 32) % 64);
     }},
    {"unwritten", 1, 32, [](EmulatedThread& m) { m.load(m.shared<float>(0) + m.thread()); }},
    {"beyond the end", 1, 32, [](EmulatedThread& m) { m.store(m.shared<float>(1024) + m.thread(), 1.0f); }},
    {"misaligned", 1, 32, [](EmulatedThread& m) { m.store(m.shared<float>(2), 1.0f); }},
    {"a lane stays away", 1, 32,
     [](EmulatedThread& m) {
       if (m.thread() != 5) m.shuffle_xor(1.0f, 1);
     }},
    {"lanes diverge", 1, 32, [](EmulatedThread& m) { m.shuffle_xor(1.0f, m.thread() == 3 ? 2 : 1); }},
    {"a block stays away", 2, 32,
     [](EmulatedThread& m) {
       if (m.rank() == 1) return;
       m.cluster_arrive(), m.cluster_wait();
     }},
    {"wait without arrive", 2, 32, [](EmulatedThread& m) { m.cluster_wait(); }},
};

int check_fault(const std::string& name) {
  for (const Fault& fault : kFaults) {
    if (name != fault.name) continue;
    try {
      emulate({1, 1, fault.blocks, fault.threads, 1024, 1}, fault.kernel);
      std::printf("nothing\n");
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
    }
    return 0;
  }
  std::fprintf(stderr, "no such fault: %s\n", name.c_str());
  return 2;
}

}  // namespace
}  // namespace fusedrnn

int main(int count, char** arguments) {
  using namespace fusedrnn;
  const std::string mode = count > 1 ? arguments[1] : "";
  if (mode == "fragments") return check_fragments() != 0;
  if (mode == "fault" && count > 2) return check_fault(arguments[2]);
  if (mode != "loops") return 2;
  int bad = 0;
  const std::vector<std::string> seeds(arguments + 2, arguments + count);
  for (const std::string& seed : seeds) {
#if defined(FEW)
    bad += run_cells(std::stoul(seed), CellList<Lstm, Gru>{});
#else
    bad += run_cells(std::stoul(seed), Registry{});
#endif
  }
  std::printf("%d case(s) differ; the largest difference is %.2f of what is allowed\n", bad, worst_of_all);
  return bad != 0;
}
