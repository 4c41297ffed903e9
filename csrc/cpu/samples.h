// The inputs of backward for threads that own dendrites: they need all samples.
#pragma once

#include "gradients.h"

namespace {

// x and the gradients at the somas, transposed into tiles. Where x is small, every thread makes its
// own copies: fetching tiles from the caches of other cores would take longer.
template <class T, int V>
class Samples {
 public:
  Samples(const dk::Topology& net, const dk::BackwardCall<T>& call, int64_t threads, Carver& carver)
      : net_(net),
        call_(call),
        carver_(carver),
        tiles_(ceil_div(call.batch, kTile)),
        somas_(call.cable ? net.somas : 0),
        group_(net.order ? net.group_size : 1),
        own_(call.batch * net.in_features * int64_t(sizeof(T)) <= kOwnBytes) {
    // Two threads may both need the group of somas at their border: one more group per thread.
    room_ = somas_ + (own_ && somas_ ? threads * group_ : 0);
    x_at_ = carver.reserve<T>((own_ ? threads : 1) * tiles_ * net.in_features * kTile);
    soma_at_ = carver.reserve<T>(tiles_ * room_ * kTile);
    counted_at_ = carver.reserve<T>(threads * group_);
  }
  int64_t tiles() const { return tiles_; }

  // Called after carver.allocate: all threads fill the tiles together, unless each has copies.
  void share(const dk::Runtime& runtime) const {
    if (own_) return;
    const int64_t N = net_.in_features, parts = runtime.threads;
    parallel(runtime, parts, [&](int64_t i) {
      const int64_t s0 = split<T>(somas_, i, parts);
      transpose_inputs(split<T>(N, i, parts), split<T>(N, i + 1, parts), 0);
      soma_gradients(s0, split<T>(somas_, i + 1, parts), 0, call_.dsoma_bias + s0);
    });
  }
  // Called by thread i, which owns the dendrites at positions p0..p1-1: fills its copies, if any.
  void take(int64_t i, int64_t p0, int64_t p1) const {
    if (!own_) return;
    transpose_inputs(0, net_.in_features, i);
    if (!somas_) return;
    // Thread i - 1 adds up dsoma_bias of the group that both need; these sums are not used.
    const int64_t needed = i ? first_soma_of(p0) : 0, s0 = i ? first_soma_from(p0) : 0;
    soma_gradients(needed, s0, i, carver_.at<T>(counted_at_) + i * group_);
    soma_gradients(s0, first_soma_from(p1), i, call_.dsoma_bias + s0);
  }

  // The tile that thread i reads.
  T* x(int64_t i, int64_t tile) const {
    return carver_.at<T>(x_at_) + (own_ ? i * tiles_ + tile : tile) * net_.in_features * kTile;
  }
  T* soma(int64_t i, int64_t tile) const {  // [soma][samples]; null without a soma stage
    return somas_ ? carver_.at<T>(soma_at_) + (tile * room_ + shift(i)) * kTile : nullptr;
  }

 private:
  static constexpr int64_t kTile = V * kLanes<T>, kOwnBytes = 1 << 19;

  int64_t shift(int64_t i) const { return own_ ? i * group_ : 0; }
  // The first soma of the group of the dendrite at position p.
  int64_t first_soma_of(int64_t p) const {
    if (p >= net_.rows) return somas_;
    return net_.order ? net_.soma[p] / group_ * group_ : soma_of(net_, p);
  }
  // The first soma of the first group that has no dendrite before position p.
  int64_t first_soma_from(int64_t p) const {
    const int64_t s = first_soma_of(p);
    return net_.soma_ptr[s] < p && p < net_.rows ? min64(somas_, s + group_) : s;
  }
  // Inputs [n0, n1) of every tile.
  void transpose_inputs(int64_t n0, int64_t n1, int64_t i) const {
    for (int64_t tile = 0; tile < tiles_; ++tile)
      tile_in<T, V>(call_.storage, call_.x, tile * kTile, samples_of(tile), net_.in_features, n0,
                    n1, x(i, tile) + n0 * kTile);
  }
  int64_t samples_of(int64_t tile) const { return min64(kTile, call_.batch - tile * kTile); }
  void soma_gradients(int64_t s0, int64_t s1, int64_t i, T* dsoma_bias) const {
    for (int64_t tile = 0; tile < tiles_ && s0 < s1; ++tile)
      soma_gradient<T, V>(net_, call_, tile, s0, s1, tile == 0, soma(i, tile) + s0 * kTile,
                          dsoma_bias);
  }

  const dk::Topology& net_;
  const dk::BackwardCall<T>& call_;
  const Carver& carver_;
  int64_t tiles_, somas_, group_, room_, x_at_, soma_at_, counted_at_;
  bool own_;
};

}  // namespace
