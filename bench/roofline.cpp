// Gather-FMA roofline: what a core reaches on the memory accesses of a sparse layer and nothing
// else. Every thread owns a tile x[N][tile] of floats; for each synapse one random row of it is
// multiplied by a weight that is broadcast, and added to its dendrite's accumulators. Either one
// dendrite after the other, whose FMAs wait for each other in a narrow tile, or neighbours
// interleaved so that eight accumulators hide that latency.
//
//   roofline INPUTS SYNAPSES THREADS MILLISECONDS
//   -> for each tile width a line "WIDTH GFLOP/s one by one GFLOP/s interleaved"
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <thread>
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

// Median time of a pass, in every thread; the threads run together. GFLOP/s of all of them.
template <int V, int kRows>
double measure(int64_t inputs, int64_t synapses, int threads, double seconds) {
  std::atomic<int> waiting{threads};
  std::vector<double> rate(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      const size_t bytes = (inputs * V * kLanes * sizeof(float) + kPage - 1) / kPage * kPage;
      float* tile = static_cast<float*>(std::aligned_alloc(kPage, bytes));
      if (!tile) std::abort();
      std::fill_n(tile, inputs * V * kLanes, 1e-3f);
      std::mt19937 random(t);
      std::vector<uint16_t> column(synapses);
      for (auto& c : column) c = uint16_t(random() % uint32_t(inputs));
      const std::vector<float> weight(synapses, 0.5f);
      alignas(64) float out[kLanes];
      std::vector<double> times;
      pass<V, kRows>(tile, column.data(), weight.data(), synapses, out);
      --waiting;
      while (waiting.load() > 0) std::this_thread::yield();
      const double end = now() + seconds;
      for (double start = now(), stop; start < end; start = stop) {
        pass<V, kRows>(tile, column.data(), weight.data(), synapses, out);
        stop = now();
        times.push_back(stop - start);
      }
      std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
      constexpr int64_t kGroup = kRows * kSynapses;
      const double flops = 2.0 * double(synapses / kGroup * kGroup) * V * kLanes;
      rate[t] = out[0] >= 0 ? flops / times[times.size() / 2] : 0;
      std::free(tile);
    });
  double sum = 0;
  for (int t = 0; t < threads; ++t) pool[t].join(), sum += rate[t];
  return 1e-9 * sum;
}

template <int V>
void report(int64_t inputs, int64_t synapses, int threads, double seconds) {
  std::printf("%d %.3f %.3f\n", V * kLanes, measure<V, 1>(inputs, synapses, threads, seconds),
              measure<V, kMostRows / V>(inputs, synapses, threads, seconds));
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
}
