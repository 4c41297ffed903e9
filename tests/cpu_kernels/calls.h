// One call of a kernel: its memory, and the comparison of its results with the expected ones.
#pragma once

#include <atomic>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <thread>
#if __has_include(<valgrind/memcheck.h>)
#include <valgrind/memcheck.h>
#else
#define RUNNING_ON_VALGRIND 0
#define VALGRIND_MAKE_MEM_UNDEFINED(data, bytes)
#endif

#include "naive.h"
#include "workspace.h"

namespace {

constexpr int kThreads = 3;
std::string running;  // the current case, for error messages
std::atomic<int64_t> cases{0};
bool together = false;  // several calls at a time, with the workspaces of the package

// ---- what the kernels need from their caller ----

void run_on_threads(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i)
    threads.emplace_back(body, n * i / kThreads, n * (i + 1) / kThreads, context);
  for (std::thread& thread : threads) thread.join();
}

// The memory of one call, of exactly the requested size and full of NaN; undefined to valgrind.
struct Workspace {
  static void* get(void* self, int64_t bytes) {
    auto& blocks = static_cast<Workspace*>(self)->blocks;
    blocks.emplace_back(size_t(bytes) / sizeof(Line));
    if (int64_t(blocks.back().size() * sizeof(Line)) != bytes)
      throw std::runtime_error("Expected workspaces in whole cache lines");
    memset(blocks.back().data(), 0xff, size_t(bytes));
    VALGRIND_MAKE_MEM_UNDEFINED(blocks.back().data(), size_t(bytes));
    return blocks.back().data();
  }
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Array<Line>> blocks;
  dk::Workspace of_package;
};

// The L2 size that kernels are told; they choose the width of tiles by it.
constexpr int64_t kUsualL2 = 1 << 20, kSmallL2 = 1 << 14;
int64_t l2_bytes = kUsualL2;

dk::Runtime runtime(int threads, Workspace& workspace) {
  if (together)
    return {threads, l2_bytes, run_on_threads, dk::Workspace::get, &workspace.of_package};
  return {threads, l2_bytes, run_on_threads, Workspace::get, &workspace};
}

template <class T>
const T* pointer(const Array<T>& bias) {
  return bias.empty() ? nullptr : bias.data();
}

// ---- outputs ----

template <class T>
Array<T> poisoned(int64_t count) {
  Array<T> values(size_t(count), std::numeric_limits<T>::quiet_NaN());
  VALGRIND_MAKE_MEM_UNDEFINED(values.data(), values.size() * sizeof(T));
  return values;
}

template <class T>
double tolerance(const Inputs<T>& in, const Values& values, int64_t i) {
  return in.exact ? 0 : double(values.terms) * std::numeric_limits<T>::epsilon() * values.size[i];
}

// Rounding to the storage type is monotonic. So a result that was within the tolerance before
// rounding is between the rounded ends of the tolerance after it.
template <class T>
void compare(const char* what, const Inputs<T>& in, const Array<T>& found, const Values& values,
             dk::Storage storage = dk::Storage::full) {
  for (size_t i = 0; i < found.size(); ++i) {
    const double expected = values.exact[i], allowed = tolerance(in, values, int64_t(i));
    if (std::abs(found[i] - expected) <= allowed) continue;  // false for NaN
    if (found[i] < expected && found[i] >= rounded(expected - allowed, storage)) continue;
    if (found[i] > expected && found[i] <= rounded(expected + allowed, storage)) continue;
    char message[200];
    snprintf(message, sizeof message, "%s[%zu]: expected %.17g within %.3g%s, got %.17g", what, i,
             expected, allowed, storage == dk::Storage::full ? "" : " before it is rounded",
             double(found[i]));
    throw std::runtime_error(message);
  }
}

template <class T>
void compare(const char* what, const Inputs<T>& in, const Memory& found, const Values& values) {
  compare(what, in, numbers_in<T>(found, in.precision.storage), values, in.precision.storage);
}

// Where rounding could change the sign of u, both bits are correct.
template <class T>
void compare_signs(const Network& net, const Inputs<T>& in, const Array<uint32_t>& found,
                   const Values& u) {
  for (int64_t b = 0; b < in.batch; ++b)
    for (int64_t r = 0; r < net.rows(); ++r) {
      const int64_t i = b * net.rows() + r;
      if (!in.exact && std::abs(u.exact[i]) <= tolerance(in, u, i)) continue;
      if (bit(found, net.rows(), b, r) != (u.exact[i] > 0))
        throw std::runtime_error("sign of u[" + std::to_string(b) + ", " + std::to_string(r) +
                                 "] is wrong");
    }
}

Array<uint32_t> wrong_signs(const Network& net, int64_t batch, const Values& u) {
  Array<uint32_t> signs(size_t((batch + 31) / 32 * net.rows()), 0);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t r = 0; r < net.rows(); ++r)
      if (u.exact[b * net.rows() + r] <= 0) signs[(b / 32) * net.rows() + r] |= 1u << (b % 32);
  return signs;
}

// ---- calls ----

template <class T>
auto forward_of(const dk::KernelTable& table) {
  if constexpr (sizeof(T) == 4)
    return table.forward_f32;
  else
    return table.forward_f64;
}
template <class T>
auto backward_of(const dk::KernelTable& table) {
  if constexpr (sizeof(T) == 4)
    return table.backward_f32;
  else
    return table.backward_f64;
}

enum class Forward { kRows, kSomas, kSomasWithSigns };

template <class T>
void check_forward(const dk::KernelTable& table, const Network& net, const dk::Topology& topology,
                   const Inputs<T>& in, const NaiveForward& naive, int threads, Forward kind) {
  const bool somas = kind != Forward::kRows;
  dk::ForwardCall<T> call{};
  call.batch = in.batch;
  call.storage = in.precision.storage;
  call.round_x = in.precision.round_x;
  call.x = in.stored_x.data();
  call.weight = in.weight.data();
  call.dendrite_bias = pointer(in.dendrite_bias);
  call.slope = call.soma_slope = T(1);
  if (somas) {
    call.cable = in.cable.data();
    call.soma_bias = pointer(in.soma_bias);
    call.slope = in.slope;
    call.soma_slope = in.soma_slope;
  }
  Memory y = poisoned_memory<T>(in.batch * (somas ? net.somas() : net.rows()), call.storage);
  Array<uint32_t> signs = wrong_signs(net, in.batch, naive.u);
  call.y = y.data();
  if (kind == Forward::kSomasWithSigns) call.signs = signs.data();
  Workspace workspace;
  forward_of<T>(table)(topology, call, runtime(threads, workspace));
  compare(somas ? "y" : "u", in, y, somas ? naive.y : naive.u);
  if (call.signs) compare_signs(net, in, signs, naive.u);
  ++cases;
}

// With a topology that has no plan, backward runs without dx.
template <class T>
void check_backward(const dk::KernelTable& table, const Network& net, const dk::Topology& topology,
                    const Inputs<T>& in, const NaiveBackward& naive, int threads, bool somas) {
  Memory dx =
      poisoned_memory<T>(topology.plan_row ? in.batch * net.in_features : 0, in.precision.storage);
  Array<T> dweight = poisoned<T>(net.nnz()), ddendrite_bias = poisoned<T>(net.rows()),
           dcable = poisoned<T>(somas ? net.rows() : 0),
           dsoma_bias = poisoned<T>(somas ? net.somas() : 0);
  dk::BackwardCall<T> call{};
  call.batch = in.batch;
  call.storage = in.precision.storage;
  call.grad = somas ? in.stored_grad_y.data() : in.stored_grad_u.data();
  call.x = in.stored_x.data();
  call.weight = in.weight.data();
  call.dendrite_bias = pointer(in.dendrite_bias);
  call.slope = call.soma_slope = T(1);
  if (topology.plan_row) call.dx = dx.data();
  call.dweight = dweight.data();
  call.ddendrite_bias = ddendrite_bias.data();
  if (somas) {
    call.y = in.stored_y.data();
    call.signs = in.signs.data();
    call.cable = in.cable.data();
    call.slope = in.slope;
    call.soma_slope = in.soma_slope;
    call.dcable = dcable.data();
    call.dsoma_bias = dsoma_bias.data();
  }
  Workspace workspace;
  backward_of<T>(table)(topology, call, runtime(threads, workspace));
  compare("dx", in, dx, naive.dx);
  compare("dweight", in, dweight, naive.dweight);
  compare("ddendrite_bias", in, ddendrite_bias, naive.ddendrite_bias);
  compare("dcable", in, dcable, naive.dcable);
  compare("dsoma_bias", in, dsoma_bias, naive.dsoma_bias);
  ++cases;
}

}  // namespace
