// Compares the CPU kernels of all instruction sets of this machine, or of those named as arguments,
// with loops over their definition. It needs neither torch nor Python, so it can be cross-compiled
// and run in an emulator. It stops at the first mismatch or access out of bounds and prints the
// case. The thread sanitizer sees only what several threads do, and valgrind a few cases.
#include <csignal>
#include <cstdlib>
#include <numeric>

#include "conversions.h"
#include "isa.h"

namespace {

[[noreturn]] void fail(const std::exception& error) {
  fprintf(stderr, "FAILED: %s\n  %s\n", running.c_str(), error.what());
  _exit(1);
}

// ---- inputs ----

template <class T>
Array<T> draw(Random& random, int64_t count, bool exact) {
  std::normal_distribution<double> normal;
  Array<T> values(size_t(count), T(0));
  for (T& value : values) value = exact ? T(int(random() % 5) - 2) : T(normal(random));
  return values;
}

// With round_x and `exact`, x is slightly off an integer: rounding to bfloat16 must restore it.
template <class T>
void draw_x(Random& random, int64_t count, Inputs<T>& in) {
  Array<T> x = draw<T>(random, count, in.exact);
  const bool round = in.precision.round_x;
  if (round && in.exact)
    for (T& value : x) value *= T(random() % 2 ? 1 + 0x1p-10 : 1 - 0x1p-10);
  in.stored_x = memory_of(x, in.precision.storage);
  in.x = numbers_in<T>(in.stored_x, in.precision.storage);
  if (round)
    for (T& value : in.x) value = T(rounded(value, dk::Storage::bf16));
}

template <class T>
Inputs<T> draw_inputs(const Network& net, int64_t batch, bool exact, bool biases,
                      const Precision& precision) {
  Random random(2);
  Inputs<T> in{};
  in.batch = batch;
  in.exact = exact;
  in.slope = T(exact ? .5 : .1);
  in.soma_slope = T(exact ? .25 : .3);
  in.precision = precision;
  const auto some = [&](int64_t count) { return draw<T>(random, count, exact); };
  const auto samples = [&](int64_t count, Array<T>& numbers, Memory& stored) {
    stored = memory_of(some(count), precision.storage);
    numbers = numbers_in<T>(stored, precision.storage);
  };
  draw_x(random, batch * net.in_features, in);
  in.weight = some(net.nnz());
  in.cable = some(net.rows());
  if (biases) {
    in.dendrite_bias = some(net.rows());
    in.soma_bias = some(net.somas());
  }
  samples(batch * net.somas(), in.y, in.stored_y);
  samples(batch * net.somas(), in.grad_y, in.stored_grad_y);
  samples(batch * net.rows(), in.grad_u, in.stored_grad_u);
  in.signs.resize(size_t((batch + 31) / 32 * net.rows()));
  for (uint32_t& word : in.signs) word = uint32_t(random());
  return in;
}

// ---- cases ----

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadsOnly = true;
#else
constexpr bool kThreadsOnly = false;
#endif

const Precision kFull{"", dk::Storage::full, false};
const std::vector<Precision> kRounded{{"bfloat16, ", dk::Storage::bf16, false},
                                      {"float16, ", dk::Storage::f16, false},
                                      {"x rounded, ", dk::Storage::full, true},
                                      {"bfloat16, x rounded, ", dk::Storage::bf16, true},
                                      {"float16, x rounded, ", dk::Storage::f16, true}};

struct Subject {
  Network net;
  std::vector<int64_t> batches;
  std::vector<int> threads;
  std::vector<Plan> plans;
  std::vector<Order> orders;
  std::vector<int64_t> thorough;  // batches that also run with 16-bit samples and with orders
};

template <class T>
void check_inputs(const dk::KernelTable& table, const Subject& subject, int64_t batch, bool exact,
                  bool biases, const Precision& precision = kFull) {
  const Network& net = subject.net;
  const Inputs<T> in = draw_inputs<T>(net, batch, exact, biases, precision);
  const std::string context = std::string(table.isa) +
                              (sizeof(T) == 4 ? " float32 " : " float64 ") + precision.name +
                              net.name + ", batch " + std::to_string(batch) +
                              (exact ? ", integers" : "") + (biases ? ", biases" : "");
  const NaiveForward forward(net, in);
  std::vector<NaiveBackward> backward;  // rows, somas
  for (const bool somas : {false, true}) backward.emplace_back(net, in, somas);
  for (const bool narrow : {true, false})
    for (const int threads : subject.threads) {
      if (narrow && net.in_features > 65536) continue;
      if (kThreadsOnly && (threads == 1 || !narrow)) continue;
      if (!narrow && subject.threads.size() > 1 && precision.name[0]) continue;  // takes minutes
      const std::string how = context + (narrow ? ", uint16 columns, " : ", int32 columns, ") +
                              std::to_string(threads) + " threads, ";
      const auto check_forwards = [&](const dk::Topology& given, std::vector<Forward> kinds) {
        for (const Forward kind : kinds)
          check_forward(table, net, given, in, forward, threads, kind);
        if (!precision.name[0] || subject.threads.size() > 1) return;
        l2_bytes = kSmallL2;  // kernels then store tiles of x as pairs of bfloat16
        for (const Forward kind : kinds)
          check_forward(table, net, given, in, forward, threads, kind);
        l2_bytes = kUsualL2;
      };
      // The package never calls backward with a batch of 0 or with round_x.
      const bool with_backward = batch > 0 && !precision.round_x;
      running = how + "forward";
      const dk::Topology plain = topology(net, nullptr, narrow);
      check_forwards(plain, {Forward::kRows, Forward::kSomas, Forward::kSomasWithSigns});
      for (const Order& order : subject.orders) {
        if (std::count(subject.thorough.begin(), subject.thorough.end(), batch) == 0) break;
        const bool of_rows = order.soma.empty();
        running = how + "groups of " + std::to_string(order.group_size) +
                  (of_rows ? " rows in order" : " somas in order");
        const dk::Topology ordered = ordered_topology(net, order, narrow);
        if (of_rows) {
          check_forwards(ordered, {Forward::kRows});
          continue;
        }
        check_forwards(ordered, {Forward::kSomas, Forward::kSomasWithSigns});
        if (with_backward) check_backward(table, net, ordered, in, backward[1], threads, true);
      }
      if (!with_backward) continue;
      for (const bool somas : {false, true}) {
        running = how + (somas ? "backward of somas" : "backward of rows");
        check_backward(table, net, plain, in, backward[somas], threads, somas);
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

const std::vector<int64_t> kBatches{0, 1, 2, 16, 31, 32, 33, 65, 129},
    kThorough{1, 16, 31, 33, 129};

// Networks with so little work that kernels use one thread.
Subject small(Network net, std::vector<int64_t> batches = kBatches) {
  const std::vector<int64_t> thorough = batches.size() == 1 ? batches : kThorough;
  Subject subject{std::move(net), std::move(batches), {1}, {}, {}, thorough};
  const bool odd = subject.net.rows() % 2;
  subject.plans = {make_plan(subject.net, 3, odd ? 1 : 4),
                   make_plan(subject.net, 1024, odd ? 4 : 1)};
  subject.orders = {make_order(subject.net, 1), make_order(subject.net, 64),
                    make_order(subject.net, 3, true)};
  return subject;
}

// One of many networks that differ in their fan-in. 16-bit samples and orders are checked only for
// the fan-ins whose loops differ.
Subject small_of(int fan_in, Network net) {
  Subject subject = small(std::move(net));
  const std::vector<int> chosen{1, 5, 8, 16, 32, 48};
  if (std::count(chosen.begin(), chosen.end(), fan_in) == 0) {
    subject.orders.clear();
    subject.thorough.clear();
  }
  return subject;
}

// Two plans: with more blocks than threads, threads divide the blocks; with fewer, the batch.
Subject large(Network net, std::vector<int64_t> batches, std::vector<int64_t> thorough) {
  Subject subject{std::move(net), std::move(batches), {1, kThreads}, {}, {}, std::move(thorough)};
  for (const int64_t block_rows : {256, 1024})
    subject.plans.push_back(make_plan(subject.net, block_rows, block_rows == 256 ? 1 : 4));
  for (const int64_t group_size : {int64_t(1), int64_t(5), int64_t(64), subject.net.somas()})
    subject.orders.push_back(make_order(subject.net, group_size));
  for (const int64_t group_size : {7, 512})
    subject.orders.push_back(make_order(subject.net, group_size, true));
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
    all.push_back(small_of(k, make_network("fan-in " + std::to_string(k), 61,
                                           constant(9 - k % 2, k), {0, 4, 1, 0, 2, 2 - k % 2, 0})));
  all.push_back(small(make_network("one of each", 3, {1}, {1})));
  all.push_back(small(make_network("one input", 1, {1, 0, 1, 1}, {1, 3})));
  all.push_back(small(make_network("no synapses", 5, {0, 0, 0}, {2, 1})));
  all.push_back(
      small(make_network("no somas with dendrites but one", 40, constant(37, 5), {0, 0, 37, 0})));
  all.push_back(small(make_network("dense", 33, constant(20, 33), constant(20, 1))));
  all.push_back(small(make_network("uneven", 64, uneven(45, 21), {0, 0, 1, 6, 29, 9})));
  all.push_back(small(make_network("wide", 70000, uneven(20, 30), {20}), {33}));
  // 100 and 130 somas, of which every third has no dendrites.
  std::vector<int> sizes{13}, many_sizes{40};
  for (int i = 0; i < 33; ++i) sizes.insert(sizes.end(), {0, 13, 26});
  for (int i = 0; i < 43; ++i) many_sizes.insert(many_sizes.end(), {19, 0, 10});
  many_sizes.back() += 1300 - std::accumulate(many_sizes.begin(), many_sizes.end(), 0);
  const std::vector<int64_t> few{1, 2, 33, 100, 129};
  all.push_back(large(make_network("many dendrites", 150, constant(1300, 16), sizes), few, {129}));
  all.push_back(
      large(make_network("many uneven dendrites", 150, uneven(1300, 40), many_sizes), few, {100}));
  // x is large enough that all threads transpose it together, and tiles may still be wide.
  all.push_back(
      large(make_network("two wide tiles", 900, constant(390, 16), constant(30, 13)), {200}, {}));
  // Enough work for several threads with a single sample.
  all.push_back(
      large(make_network("many synapses", 150, constant(1500, 48), constant(60, 25)), {1}, {1}));
  // The only network where x does not fit the cache but threads divide the blocks (float64), and
  // where G is accumulated in dw.
  all.push_back(
      large(make_network("many inputs", 3100, constant(1040, 48), constant(52, 20)), {65}, {}));
  // Sums longer than a chain: over rows, and over columns that a thread adds up without a plan.
  all.push_back(small(make_network("long rows", 400, {300, 129, 128, 0, 17, 256, 385, 400}, {3, 5}),
                      {1, 16, 33, 65}));
  all.push_back(
      large(make_network("few inputs", 3, constant(2600, 3), constant(200, 13)), {1, 2, 33}, {}));
  // The batch is much larger than the network: threads divide the batch even without dx.
  all.push_back(large(make_network("many samples", 510, uneven(400, 16), constant(40, 10)),
                      {785, 890}, {785}));
  return all;
}

bool is_chosen(const Subject& subject) {
  if (kThreadsOnly) return subject.threads.size() > 1;
  if (!RUNNING_ON_VALGRIND) return true;
  const std::vector<std::string> few{"fan-in 5",  "fan-in 16",   "fan-in 48",
                                     "one input", "no synapses", "uneven"};
  return std::count(few.begin(), few.end(), subject.net.name) > 0;
}

// Several calls at a time, as from threads of Python: they share the connectivity, its plan, the
// parameters and the pool of workspaces, and nothing else.
template <class T>
void check_together(const dk::KernelTable& table, const Subject& subject) {
  const Network& net = subject.net;
  const Plan& plan = subject.plans[0];
  const dk::Topology topology = ::topology(net, &plan, true);
  const Inputs<T> in = draw_inputs<T>(net, 100, true, true, kFull);
  const NaiveForward forward(net, in);
  const NaiveBackward backward(net, in, true);
  running = std::string(table.isa) + ", calls at a time";
  together = dk::poison_workspaces = true;
  const auto call = [&] {
    try {
      for (int i = 0; i < 10; ++i) {
        const int threads = 1 + i % 2 * (kThreads - 1);
        check_forward(table, net, topology, in, forward, threads, Forward::kSomasWithSigns);
        check_backward(table, net, topology, in, backward, threads, true);
      }
    } catch (const std::exception& error) {
      fail(error);
    }
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back(call);
  for (std::thread& caller : callers) caller.join();
  together = false;
}

void check(const dk::KernelTable& table, const std::vector<Subject>& all) {
  check_conversions(table);
  check_together<float>(table, all[0]);
  for (const Subject& subject : all)
    for (const bool exact : {false, true}) {
      if (kThreadsOnly && !exact) continue;
      for (const int64_t batch : subject.batches) {
        check_inputs<float>(table, subject, batch, exact, !exact || batch % 2);
        check_inputs<double>(table, subject, batch, exact, exact || batch % 2);
      }
      for (const int64_t batch : subject.thorough)
        for (const Precision& precision : kRounded)
          check_inputs<float>(table, subject, batch, exact, !exact || batch % 2, precision);
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
  std::vector<Subject> all = subjects();
  all.erase(std::remove_if(all.begin(), all.end(), [](auto& one) { return !is_chosen(one); }),
            all.end());
  try {
    size_t checked = 0;
    for (const dk::KernelTable* table : dk::supported_tables()) {
      if (!wanted.empty() && std::count(wanted.begin(), wanted.end(), table->isa) == 0) continue;
      cases = 0;
      check(*table, all);
      printf("%s: %lld cases, all good\n", table->isa, static_cast<long long>(cases.load()));
      fflush(stdout);
      ++checked;
    }
    running = "the instruction sets asked for";
    if (!wanted.empty() && checked != wanted.size())
      throw std::runtime_error("this machine has not all of them");
  } catch (const std::exception& error) {
    fail(error);
  }
  return 0;
}
