// The operations as loops over their definition, in double. Each result is stored with the sum of
// the absolute values of its terms. A sum of n terms in any order has an error of at most n eps
// times that (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
#pragma once

#include <cmath>
#include <vector>

#include "formats.h"
#include "network.h"

struct Values {
  explicit Values(int64_t count, int64_t terms)
      : exact(size_t(count)), size(size_t(count)), terms(terms) {}
  void add(int64_t i, double term, double term_size) {
    exact[i] += term;
    size[i] += term_size;
  }
  void add(int64_t i, double term) { add(i, term, std::abs(term)); }

  std::vector<double> exact, size;
  int64_t terms;  // upper bound of the roundings in one result
};

struct Precision {
  const char* name;
  dk::Storage storage = dk::Storage::full;
  bool round_x = false;
};

template <class T>
struct Inputs {
  int64_t batch;
  bool exact;  // small integers and halves: no order of additions rounds
  T slope, soma_slope;
  Precision precision;
  Array<T> x;                                        // as the synapses read it
  Array<T> weight, dendrite_bias, cable, soma_bias;  // biases: empty if there are none
  Array<T> y, grad_y, grad_u;                        // backward accepts any y and signs
  Memory stored_x, stored_y, stored_grad_y, stored_grad_u;
  Array<uint32_t> signs;
};

inline int64_t longest_row(const Network& net) {
  int64_t longest = 0;
  for (int64_t r = 0; r < net.rows(); ++r)
    longest = std::max<int64_t>(longest, net.crow[r + 1] - net.crow[r]);
  return longest;
}

inline bool bit(const Array<uint32_t>& signs, int64_t rows, int64_t b, int64_t r) {
  return signs[(b / 32) * rows + r] >> (b % 32) & 1;
}

struct NaiveForward {
  template <class T>
  NaiveForward(const Network& net, const Inputs<T>& in)
      : u(in.batch * net.rows(), longest_row(net) + 2),
        y(in.batch * net.somas(), longest_row(net) + net.rows() + 5) {
    const auto leaky = [](double value, double slope) { return value > 0 ? value : slope * value; };
    for (int64_t b = 0; b < in.batch; ++b)
      for (int64_t r = 0; r < net.rows(); ++r) {
        const int64_t at = b * net.rows() + r;
        if (!in.dendrite_bias.empty()) u.add(at, in.dendrite_bias[r]);
        for (int64_t j = net.crow[r]; j < net.crow[r + 1]; ++j)
          u.add(at, double(in.weight[j]) * in.x[b * net.in_features + net.columns[j]]);
      }
    for (int64_t b = 0; b < in.batch; ++b)
      for (int64_t s = 0; s < net.somas(); ++s) {
        const int64_t at = b * net.somas() + s;
        if (!in.soma_bias.empty()) y.add(at, in.soma_bias[s]);
        for (int64_t r = net.soma_ptr[s]; r < net.soma_ptr[s + 1]; ++r)
          y.add(at, in.cable[r] * leaky(u.exact[b * net.rows() + r], in.slope),
                std::abs(double(in.cable[r])) * u.size[b * net.rows() + r]);
        y.exact[at] = leaky(y.exact[at], in.soma_slope);
      }
  }
  Values u, y;  // [B, R], [B, S]
};

struct NaiveBackward {
  template <class T>
  NaiveBackward(const Network& net, const Inputs<T>& in, bool somas)
      : dx(in.batch * net.in_features, net.rows() + 7),
        dweight(net.nnz(), in.batch + 6),
        ddendrite_bias(net.rows(), in.batch + 6),
        dcable(net.rows(), in.batch + longest_row(net) + 8),
        dsoma_bias(net.somas(), in.batch + 4) {
    for (int64_t s = 0; s < net.somas(); ++s)
      for (int64_t b = 0; b < in.batch; ++b) {
        const int64_t at = b * net.somas() + s;
        const double at_soma =
            somas ? in.grad_y[at] * (in.y[at] > 0 ? 1. : double(in.soma_slope)) : 0;
        dsoma_bias.add(s, at_soma);
        for (int64_t r = net.soma_ptr[s]; r < net.soma_ptr[s + 1]; ++r)
          add_dendrite(net, in, b, r, somas ? in.cable[r] : 1.,
                       somas ? at_soma * (bit(in.signs, net.rows(), b, r) ? 1. : double(in.slope))
                             : double(in.grad_u[b * net.rows() + r]));
      }
  }
  Values dx, dweight, ddendrite_bias, dcable, dsoma_bias;

 private:
  // q times the cable weight is the gradient at the pre-activation of the dendrite.
  template <class T>
  void add_dendrite(const Network& net, const Inputs<T>& in, int64_t b, int64_t r, double cable,
                    double q) {
    ddendrite_bias.add(r, cable * q);
    if (!in.dendrite_bias.empty()) dcable.add(r, in.dendrite_bias[r] * q);
    for (int64_t j = net.crow[r]; j < net.crow[r + 1]; ++j) {
      const int64_t input = b * net.in_features + net.columns[j];
      dx.add(input, in.weight[j] * cable * q);
      dweight.add(j, cable * q * in.x[input]);
      dcable.add(r, in.weight[j] * q * in.x[input]);
    }
  }
};
