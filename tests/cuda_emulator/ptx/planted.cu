// Kernels with one bug each, and some without: what the checks must tell apart.
struct Args {
  const float* in;
  float* out;
  int n;  // of each; a block has n threads
};

extern __shared__ float tile[];

#define KERNEL(NAME) extern "C" __global__ void NAME(const Args args)
constexpr unsigned kAll = 0xffffffffu;

KERNEL(good_block) {
  tile[threadIdx.x] = args.in[threadIdx.x];
  __syncthreads();
  args.out[threadIdx.x] = tile[args.n - 1 - threadIdx.x];
}

// Through an address of which nvcc does not know whether it is shared.
KERNEL(good_generic) {
  tile[threadIdx.x] = args.in[threadIdx.x];
  __syncthreads();
  const float* from = args.n < 1000 ? tile : args.in;
  args.out[threadIdx.x] = from[args.n - 1 - threadIdx.x];
}

KERNEL(outside_generic) {
  tile[threadIdx.x] = args.in[threadIdx.x];
  __syncthreads();
  const float* from = args.n < 1000 ? tile : args.in;
  args.out[threadIdx.x] = from[args.n - threadIdx.x];
}

KERNEL(good_warp) {
  const unsigned t = threadIdx.x;
  tile[t] = args.in[t];
  __syncwarp();
  const float other = tile[t ^ 1];
  __syncwarp();
  tile[t] = other;
  args.out[t] = tile[t];
}

// Lanes 0 to 15 and 16 to 31 each among themselves.
KERNEL(good_half_warps) {
  const unsigned t = threadIdx.x, members = t % 32 < 16 ? 0xffffu : 0xffff0000u;
  tile[t] = args.in[t];
  __syncwarp(members);
  args.out[t] = tile[t ^ 8] + __shfl_xor_sync(members, args.in[t], 4);
}

KERNEL(race_block) {
  tile[threadIdx.x] = args.in[threadIdx.x];
  args.out[threadIdx.x] = tile[args.n - 1 - threadIdx.x];
}

// The tile is filled again while others still read it.
KERNEL(race_second_barrier) {
  for (int i = 0; i < 2; ++i) {
    tile[threadIdx.x] = args.in[threadIdx.x] + i;
    __syncthreads();
    args.out[threadIdx.x] = tile[args.n - 1 - threadIdx.x];
  }
}

KERNEL(race_blocks) { args.out[threadIdx.x] = float(blockIdx.x); }

KERNEL(race_warp) {
  const unsigned t = threadIdx.x;
  tile[t] = args.in[t];
  args.out[t] = tile[t ^ 1];
}

// A shuffle is no barrier for memory.
KERNEL(race_warp_shuffle) {
  const unsigned t = threadIdx.x;
  tile[t] = args.in[t];
  const float sum = __shfl_xor_sync(kAll, args.in[t], 1);
  args.out[t] = tile[t ^ 1] + sum;
}

KERNEL(race_half_warps) {
  const unsigned t = threadIdx.x, members = t % 32 < 16 ? 0xffffu : 0xffff0000u;
  tile[t] = args.in[t];
  __syncwarp(members);
  args.out[t] = tile[t ^ 16];
}

KERNEL(misaligned_shared) {
  tile[threadIdx.x] = args.in[threadIdx.x];
  __syncthreads();
  const unsigned at = min(threadIdx.x, blockDim.x - 2);
  const float2 pair = *reinterpret_cast<const float2*>(tile + at);
  args.out[threadIdx.x] = pair.x + pair.y;
}

KERNEL(misaligned_global) {
  const unsigned at = min(threadIdx.x, blockDim.x - 2);
  const float2 pair = __ldg(reinterpret_cast<const float2*>(args.in + at));
  args.out[threadIdx.x] = pair.x + pair.y;
}

KERNEL(outside_shared) {
  tile[threadIdx.x] = args.in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x > 0) args.out[threadIdx.x] = tile[args.n - 1 + threadIdx.x];
}

KERNEL(outside_before_shared) {
  tile[int(threadIdx.x) - 1] = args.in[threadIdx.x];
  args.out[threadIdx.x] = 0;
}

// The next float belongs to another tensor of the launch.
KERNEL(outside_global) { args.out[threadIdx.x] = args.in[threadIdx.x + 1]; }

KERNEL(outside_null) {
  const float* null = reinterpret_cast<const float*>(size_t(args.n - blockDim.x));
  args.out[threadIdx.x] = null[threadIdx.x];
}

KERNEL(uninitialised) {
  if (threadIdx.x > 0) tile[threadIdx.x] = args.in[threadIdx.x];
  __syncthreads();
  args.out[threadIdx.x] = tile[args.n - 1 - threadIdx.x];
}

KERNEL(diverged_shuffle) {
  float value = args.in[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(kAll, value, 1);
  args.out[threadIdx.x] = value;
}

KERNEL(diverged_ballot) {
  if (threadIdx.x == 5) return;
  args.out[threadIdx.x] = float(__ballot_sync(kAll, args.in[threadIdx.x] > 0));
}

// Some lanes come once more than others.
KERNEL(diverged_loop) {
  float value = args.in[threadIdx.x];
#pragma unroll 1
  for (unsigned i = 0; i < 3 + threadIdx.x % 2; ++i) value += __shfl_xor_sync(kAll, value, 2);
  args.out[threadIdx.x] = value;
}

KERNEL(diverged_source) {
  float value = args.in[threadIdx.x];
  if (threadIdx.x % 32 < 16) value = __shfl_sync(0xffffu, value, 20);
  args.out[threadIdx.x] = value;
}

KERNEL(diverged_barrier) {
  if (threadIdx.x < 32) __syncthreads();
  args.out[threadIdx.x] = args.in[threadIdx.x];
}
