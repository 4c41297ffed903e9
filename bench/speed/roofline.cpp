// Gather-FMA roofline: the speed of the memory accesses and FMAs of a sparse layer and nothing
// else. Every thread has a tile x[N][tile] of floats. Each synapse multiplies a random row of it by
// a broadcast weight and adds the products to the accumulators of its dendrite. This is measured in
// two ways: one dendrite after another, where FMAs of a narrow tile wait for each other, and
// several interleaved, where eight accumulators hide that latency. The L2 figure is for FMAs that
// read a quarter of the second-level cache in order; tiles can be faster, since some rows come from
// L1.
//
//   roofline INPUTS SYNAPSES THREADS MILLISECONDS
//   -> for each tile width a line "WIDTH GFLOP/s one by one GFLOP/s interleaved", then "L2 GFLOP/s"
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));

constexpr int kSynapses = 16;  // of a dendrite
constexpr int kMostRows = 8;   // interleaved
constexpr int kPage = 4096;

static double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// One pass over all synapses; V vectors per row of the tile, kRows dendrites at a time.
template <int V, int kRows>
__attribute__((noinline)) void pass(const float* tile, const uint16_t* column, const float* weight,
                                    int64_t synapses, float* out) {
  for (int64_t k = 0; k + kRows * kSynapses <= synapses; k += kRows * kSynapses) {
    Vector sum[kRows][V] = {};
    for (int j = 0; j < kSynapses; ++j)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = k + r * kSynapses + j;
        const float* row = tile + int64_t(column[at]) * (V * kLanes);
        const Vector w = weight[at] - Vector{};
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          Vector x;
          std::memcpy(&x, row + v * kLanes, sizeof x);
          sum[r][v] += w * x;
        }
      }
    Vector total = {};
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < V; ++v) total += sum[r][v];
    std::memcpy(out, &total, sizeof total);
  }
}

__attribute__((noinline)) void pass_in_order(const float* data, int64_t size, float weight,
                                             float* out) {
  const Vector w = weight - Vector{};
  Vector sum[kMostRows] = {};
  for (int64_t k = 0; k + kMostRows * kLanes <= size; k += kMostRows * kLanes)
#pragma GCC unroll 8
    for (int v = 0; v < kMostRows; ++v) {
      Vector x;
      std::memcpy(&x, data + k + v * kLanes, sizeof x);
      sum[v] += w * x;
    }
  Vector total = {};
  for (const Vector& s : sum) total += s;
  std::memcpy(out, &total, sizeof total);
}

struct Free {
  void operator()(void* data) const { std::free(data); }
};
using Floats = std::unique_ptr<float, Free>;

static Floats filled(int64_t count) {
  const size_t bytes = (count * sizeof(float) + kPage - 1) / kPage * kPage;
  Floats data(static_cast<float*>(std::aligned_alloc(kPage, bytes)));
  if (!data) std::abort();
  std::fill_n(data.get(), count, 1e-3f);
  return data;
}

// GFLOP/s of threads that run together, from the median time of a pass of `flops` in each thread.
// prepare(t) returns the pass of thread t, which writes a vector.
template <class Prepare>
double measure(int threads, double seconds, double flops, const Prepare& prepare) {
  std::atomic<int> waiting{threads};
  std::vector<double> rate(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      const auto run = prepare(t);
      alignas(64) float out[kLanes];
      std::vector<double> times;
      run(out);
      --waiting;
      while (waiting.load() > 0) std::this_thread::yield();
      const double end = now() + seconds;
      for (double start = now(), stop; start < end; start = stop) {
        run(out);
        stop = now();
        times.push_back(stop - start);
      }
      std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
      rate[t] = out[0] >= 0 ? flops / times[times.size() / 2] : 0;
    });
  double sum = 0;
  for (int t = 0; t < threads; ++t) pool[t].join(), sum += rate[t];
  return 1e-9 * sum;
}

template <int V, int kRows>
double measure_rows(int64_t inputs, int64_t synapses, int threads, double seconds) {
  constexpr int64_t kGroup = kRows * kSynapses;
  const double flops = 2.0 * double(synapses / kGroup * kGroup) * V * kLanes;
  return measure(threads, seconds, flops, [&](int t) {
    std::mt19937 random(t);
    std::vector<uint16_t> column(synapses);
    for (auto& c : column) c = uint16_t(random() % uint32_t(inputs));
    return [tile = filled(inputs * V * kLanes), column = std::move(column),
            weight = std::vector<float>(synapses, 0.5f)](float* out) {
      pass<V, kRows>(tile.get(), column.data(), weight.data(), int64_t(column.size()), out);
    };
  });
}

static double measure_l2(int threads, double seconds) {
  int64_t bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  constexpr int64_t kCommon = 1 << 20, kGroup = kMostRows * kLanes;
  const int64_t size = (bytes > 0 ? bytes : kCommon) / 4 / int64_t(sizeof(float)) / kGroup * kGroup;
  return measure(threads, seconds, 2.0 * double(size), [size](int) {
    return [size, data = filled(size)](float* out) { pass_in_order(data.get(), size, 0.5f, out); };
  });
}

template <int V>
void report(int64_t inputs, int64_t synapses, int threads, double seconds) {
  std::printf("%d %.3f %.3f\n", V * kLanes, measure_rows<V, 1>(inputs, synapses, threads, seconds),
              measure_rows<V, kMostRows / V>(inputs, synapses, threads, seconds));
}

int main(int count, char** argument) {
  if (count != 5) {
    std::fprintf(stderr, "Expected INPUTS (at most 65536) SYNAPSES THREADS MILLISECONDS\n");
    return 2;
  }
  const int64_t inputs = std::atoll(argument[1]), synapses = std::atoll(argument[2]);
  const int threads = std::atoi(argument[3]);
  const double seconds = 1e-3 * std::atof(argument[4]);
  report<1>(inputs, synapses, threads, seconds);
  report<2>(inputs, synapses, threads, seconds);
  report<4>(inputs, synapses, threads, seconds);
  std::printf("L2 %.3f\n", measure_l2(threads, seconds));
}
