// Runs every CPU kernel of this machine's instruction sets, or of those named as arguments, against
// loops over their definition. No torch, no Python: it cross-compiles and runs in an emulator.
// The first mismatch ends it and is named, as is what ran when memory out of bounds was touched.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <thread>

#include "isa.h"
#include "naive.h"

namespace {

constexpr int kThreads = 3;
std::string running;  // what a failure is reported with
int64_t cases = 0;

// ---- what the kernels need from their caller ----

void run_on_threads(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i)
    threads.emplace_back(body, n * i / kThreads, n * (i + 1) / kThreads, context);
  for (std::thread& thread : threads) thread.join();
}

// One call's memory, of the size asked for and full of NaN.
struct Workspace {
  static void* get(void* self, int64_t bytes) {
    auto& blocks = static_cast<Workspace*>(self)->blocks;
    blocks.emplace_back(size_t(bytes) / sizeof(Line));
    if (int64_t(blocks.back().size() * sizeof(Line)) != bytes)
      throw std::runtime_error("Expected workspaces in whole cache lines");
    memset(blocks.back().data(), 0xff, size_t(bytes));
    return blocks.back().data();
  }
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Array<Line>> blocks;
};

dk::Runtime runtime(int threads, Workspace& workspace) {
  return {threads, 1 << 20, run_on_threads, Workspace::get, &workspace};
}

// ---- inputs ----

template <class T>
Array<T> draw(Random& random, int64_t count, bool exact) {
  std::normal_distribution<double> normal;
  Array<T> values(size_t(count), T(0));
  for (T& value : values) value = exact ? T(int(random() % 5) - 2) : T(normal(random));
  return values;
}

template <class T>
Inputs<T> draw_inputs(const Network& net, int64_t batch, bool exact, bool biases) {
  Random random(2);
  const auto some = [&](int64_t count) { return draw<T>(random, count, exact); };
  Inputs<T> in{batch, exact, T(exact ? .5 : .1), {}, {}, {}, {}, {}, {}, {}, {}, {}};
  in.x = some(batch * net.in_features);
  in.weight = some(net.nnz());
  in.cable = some(net.rows());
  if (biases) {
    in.dendrite_bias = some(net.rows());
    in.soma_bias = some(net.somas());
  }
  in.y = some(batch * net.somas());
  in.grad_y = some(batch * net.somas());
  in.grad_u = some(batch * net.rows());
  in.signs.resize(size_t((batch + 31) / 32 * net.rows()));
  for (uint32_t& word : in.signs) word = uint32_t(random());
  return in;
}

template <class T>
const T* pointer(const Array<T>& bias) {
  return bias.empty() ? nullptr : bias.data();
}

// ---- outputs ----

template <class T>
Array<T> poisoned(int64_t count) {
  return Array<T>(size_t(count), std::numeric_limits<T>::quiet_NaN());
}

template <class T>
double tolerance(const Inputs<T>& in, const Values& values, int64_t i) {
  return in.exact ? 0 : double(values.terms) * std::numeric_limits<T>::epsilon() * values.size[i];
}

template <class T>
void compare(const char* what, const Inputs<T>& in, const Array<T>& found, const Values& values) {
  for (size_t i = 0; i < found.size(); ++i) {
    const double expected = values.exact[i], allowed = tolerance(in, values, int64_t(i));
    if (std::abs(found[i] - expected) <= allowed) continue;  // false for NaN
    char message[200];
    snprintf(message, sizeof message, "%s[%zu]: expected %.17g within %.3g, got %.17g", what, i,
             expected, allowed, double(found[i]));
    throw std::runtime_error(message);
  }
}

// Where rounding could have changed the sign of u, either bit will do.
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
  call.x = in.x.data();
  call.weight = in.weight.data();
  call.dendrite_bias = pointer(in.dendrite_bias);
  call.slope = T(1);
  if (somas) {
    call.cable = in.cable.data();
    call.soma_bias = pointer(in.soma_bias);
    call.slope = in.slope;
  }
  Array<T> y = poisoned<T>(in.batch * (somas ? net.somas() : net.rows()));
  Array<uint32_t> signs = wrong_signs(net, in.batch, naive.u);
  call.y = y.data();
  if (kind == Forward::kSomasWithSigns) call.signs = signs.data();
  Workspace workspace;
  forward_of<T>(table)(topology, call, runtime(threads, workspace));
  compare(somas ? "y" : "u", in, y, somas ? naive.y : naive.u);
  if (call.signs) compare_signs(net, in, signs, naive.u);
  ++cases;
}

// A topology without a plan: without dx.
template <class T>
void check_backward(const dk::KernelTable& table, const Network& net, const dk::Topology& topology,
                    const Inputs<T>& in, const NaiveBackward& naive, int threads, bool somas) {
  Array<T> dx = poisoned<T>(topology.plan_row ? in.batch * net.in_features : 0),
           dweight = poisoned<T>(net.nnz()), ddendrite_bias = poisoned<T>(net.rows()),
           dcable = poisoned<T>(somas ? net.rows() : 0),
           dsoma_bias = poisoned<T>(somas ? net.somas() : 0);
  dk::BackwardCall<T> call{};
  call.batch = in.batch;
  call.grad = somas ? in.grad_y.data() : in.grad_u.data();
  call.x = in.x.data();
  call.weight = in.weight.data();
  call.dendrite_bias = pointer(in.dendrite_bias);
  call.slope = T(1);
  if (topology.plan_row) call.dx = dx.data();
  call.dweight = dweight.data();
  call.ddendrite_bias = ddendrite_bias.data();
  if (somas) {
    call.y = in.y.data();
    call.signs = in.signs.data();
    call.cable = in.cable.data();
    call.slope = in.slope;
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

// ---- cases ----

struct Subject {
  Network net;
  std::vector<int64_t> batches;
  std::vector<int> threads;
  std::vector<Plan> plans;
};

template <class T>
void check_inputs(const dk::KernelTable& table, const Subject& subject, int64_t batch, bool exact,
                  bool biases) {
  const Network& net = subject.net;
  const Inputs<T> in = draw_inputs<T>(net, batch, exact, biases);
  const std::string context =
      std::string(table.isa) + (sizeof(T) == 4 ? " float32 " : " float64 ") + net.name +
      ", batch " + std::to_string(batch) + (exact ? ", integers" : "") + (biases ? ", biases" : "");
  const NaiveForward forward(net, in);
  std::vector<NaiveBackward> backward;  // rows, somas
  for (const bool somas : {false, true}) backward.emplace_back(net, in, somas);
  for (const bool narrow : {true, false})
    for (const int threads : subject.threads) {
      if (narrow && net.in_features > 65536) continue;
      const std::string how = context + (narrow ? ", uint16 columns, " : ", int32 columns, ") +
                              std::to_string(threads) + " threads, ";
      running = how + "forward";
      const dk::Topology no_plan = topology(net, nullptr, narrow);
      for (const Forward kind : {Forward::kRows, Forward::kSomas, Forward::kSomasWithSigns})
        check_forward(table, net, no_plan, in, forward, threads, kind);
      if (batch == 0) continue;  // backward is not called then
      for (const bool somas : {false, true}) {
        running = how + (somas ? "backward of somas" : "backward of rows");
        check_backward(table, net, no_plan, in, backward[somas], threads, somas);
        for (const Plan& plan : subject.plans) {
          running = how + (somas ? "backward of somas" : "backward of rows") +
                    " with dx, blocks of " + std::to_string(plan.block_rows) + ", groups of " +
                    std::to_string(plan.group);
          check_backward(table, net, topology(net, &plan, narrow), in, backward[somas], threads,
                         somas);
        }
      }
    }
}

const std::vector<int64_t> kBatches{0, 1, 2, 16, 31, 32, 33, 65, 129};

// Too little work for a second thread.
Subject small(Network net, std::vector<int64_t> batches = kBatches) {
  Subject subject{std::move(net), std::move(batches), {1}, {}};
  const bool odd = subject.net.rows() % 2;
  subject.plans = {make_plan(subject.net, 3, odd ? 1 : 4),
                   make_plan(subject.net, 1024, odd ? 4 : 1)};
  return subject;
}

// With more blocks than threads they divide the blocks between them, with fewer the batch.
Subject large(Network net, std::vector<int64_t> batches) {
  Subject subject{std::move(net), std::move(batches), {1, kThreads}, {}};
  for (const int64_t block_rows : {256, 1024})
    subject.plans.push_back(make_plan(subject.net, block_rows, block_rows == 256 ? 1 : 4));
  return subject;
}

std::vector<int> uneven(int count, int most) {
  Random random(3);
  std::vector<int> lengths;
  for (int i = 0; i < count; ++i) lengths.push_back(int(random() % unsigned(most + 1)));
  return lengths;
}

std::vector<Subject> subjects() {
  std::vector<Subject> all;
  const auto constant = [](int count, int value) { return std::vector<int>(size_t(count), value); };
  for (int k = 1; k <= 50; ++k)
    all.push_back(small(make_network("fan-in " + std::to_string(k), 61, constant(9 - k % 2, k),
                                     {0, 4, 1, 0, 2, 2 - k % 2, 0})));
  all.push_back(small(make_network("one of each", 3, {1}, {1})));
  all.push_back(small(make_network("one input", 1, {1, 0, 1, 1}, {1, 3})));
  all.push_back(small(make_network("no synapses", 5, {0, 0, 0}, {2, 1})));
  all.push_back(
      small(make_network("no somas with dendrites but one", 40, constant(37, 5), {0, 0, 37, 0})));
  all.push_back(small(make_network("dense", 33, constant(20, 33), constant(20, 1))));
  all.push_back(small(make_network("uneven", 64, uneven(45, 21), {0, 0, 1, 6, 29, 9})));
  all.push_back(small(make_network("wide", 70000, uneven(20, 30), {20}), {33}));
  const std::vector<int64_t> few{1, 2, 33, 129};
  all.push_back(
      large(make_network("many dendrites", 150, constant(1300, 16), constant(100, 13)), few));
  all.push_back(
      large(make_network("many uneven dendrites", 150, uneven(1300, 40), constant(130, 10)), few));
  // Only here x outgrows the cache and yet blocks are divided between threads (float64).
  all.push_back(
      large(make_network("many inputs", 3100, constant(1040, 52), constant(52, 20)), {65}));
  return all;
}

void check(const dk::KernelTable& table, const std::vector<Subject>& all) {
  for (const Subject& subject : all)
    for (const int64_t batch : subject.batches)
      for (const bool exact : {false, true}) {
        check_inputs<float>(table, subject, batch, exact, !exact || batch % 2);
        check_inputs<double>(table, subject, batch, exact, exact || batch % 2);
      }
}

#if !defined(__SANITIZE_ADDRESS__)
[[noreturn]] void out_of_bounds(int) {
  fprintf(stderr, "FAILED: %s\n  touched memory out of bounds\n", running.c_str());
  _exit(1);
}
#endif

}  // namespace

int main(int count, char** names) {
#if !defined(__SANITIZE_ADDRESS__)
  signal(SIGSEGV, out_of_bounds);
#endif
  const std::vector<std::string> wanted(names + 1, names + count);
  const std::vector<Subject> all = subjects();
  try {
    size_t checked = 0;
    for (const dk::KernelTable* table : dk::supported_tables()) {
      if (!wanted.empty() && std::count(wanted.begin(), wanted.end(), table->isa) == 0) continue;
      cases = 0;
      check(*table, all);
      printf("%s: %lld cases, all good\n", table->isa, static_cast<long long>(cases));
      fflush(stdout);
      ++checked;
    }
    running = "the instruction sets asked for";
    if (!wanted.empty() && checked != wanted.size())
      throw std::runtime_error("this machine has not all of them");
  } catch (const std::exception& error) {
    fprintf(stderr, "FAILED: %s\n  %s\n", running.c_str(), error.what());
    return 1;
  }
  return 0;
}
