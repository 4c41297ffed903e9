// Tests the conversions of all 16-bit numbers to float, and of all floats near a rounding tie to 16
// bits. Scalar functions are called directly, those on vectors through networks of one synapse per
// output.
#pragma once

#include "calls.h"
#include "storage.h"

namespace {

// All numbers of a format, all midpoints between them, the neighbouring floats of both, and special
// values.
Array<float> delicate(Format format) {
  Array<float> numbers{0.f, -0.f, INFINITY, -INFINITY};
  for (const uint32_t bits : {0x7f800001u, 0x7f80ffffu, 0x7fc00000u, 0x7fffffffu, 0xff800001u,
                              0xffffffffu, 1u, 0x7fffffu, 0x7f7fffffu, 0xff7fffffu}) {
    numbers.emplace_back();
    memcpy(&numbers.back(), &bits, 4);
  }
  for (uint32_t bits = 0; bits < format.infinity(); ++bits) {
    const double here = format.value(uint16_t(bits));
    const double step = bits ? here - format.value(uint16_t(bits - 1)) : 0;
    const double next = bits + 1 < format.infinity() ? format.value(uint16_t(bits + 1))
                                                     : here + step;  // as if the format went on
    for (const float middle : {float(here), float((here + next) / 2)})
      for (const float number :
           {std::nextafter(middle, -INFINITY), middle, std::nextafter(middle, INFINITY)}) {
        numbers.push_back(number);
        numbers.push_back(-number);
      }
  }
  return numbers;
}

// All 65536 numbers of 16 bits.
Memory all_patterns() {
  Memory memory(2 << 16);
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) memcpy(&memory[2 * bits], &bits, 2);
  return memory;
}

// Throws unless both are the same number with the same sign of zero, or both NaN.
void expect(double expected, double found, const char* what, double from) {
  if (std::isnan(expected) ? std::isnan(found)
                           : expected == found && std::signbit(expected) == std::signbit(found))
    return;
  char message[200];
  snprintf(message, sizeof message, "%s of %.17g (%a): expected %.17g, got %.17g", what, from, from,
           expected, found);
  throw std::runtime_error(message);
}

template <class Stored>
void check_scalars(dk::Storage storage) {
  const Format format = format_of(storage);
  running = "scalar conversions, " + std::to_string(format.mantissa) + " bits of mantissa";
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const double expected = format.value(uint16_t(bits));
    expect(expected, widen(Stored{uint16_t(bits)}), "widening", expected);
  }
  for (const float number : delicate(format))
    expect(format.value(format.nearest(number)), format.value(narrow(number, Stored{}).bits),
           "narrowing", number);
}

// `rows` dendrites of one synapse each: dendrite r sees input r, or input 0 if there is only one.
Network one_synapse_each(int64_t rows, int64_t in_features) {
  Network net;
  net.in_features = in_features;
  net.fan_in = 1;
  for (int64_t r = 0; r < rows; ++r) {
    net.columns.push_back(int32_t(in_features == 1 ? 0 : r));
    net.crow.push_back(int32_t(r + 1));
    net.soma_ptr.push_back(int32_t(r + 1));
  }
  return net;
}

// weight * x of each dendrite. The bias is -0, which does not change the sign of a product of zero.
Memory products(const dk::KernelTable& table, const Network& net, int64_t batch,
                Precision precision, const Memory& x, const Array<float>& weight) {
  const Array<float> bias(size_t(net.rows()), -0.f);
  Memory y = poisoned_memory<float>(batch * net.rows(), precision.storage);
  dk::ForwardCall<float> call{};
  call.batch = batch;
  call.storage = precision.storage;
  call.round_x = precision.round_x;
  call.x = x.data();
  call.weight = weight.data();
  call.dendrite_bias = bias.data();
  call.slope = call.soma_slope = 1;
  call.y = y.data();
  Workspace workspace;
  table.forward_f32(topology(net, nullptr, false), call, runtime(1, workspace));
  ++cases;
  return y;
}

// The same for a result of `products`. For a single sample, the result is a sum over lanes, most of
// them +0, so the sign of zero is lost.
void expect_product(int64_t batch, double expected, double found, const char* what, double from) {
  const double zero = batch == 1 ? 0. : -0.;
  expect(expected + zero, found + zero, what, from);
}

// Inputs that must come out unchanged, in rows of one (scalars), of many (vectors) and of both.
void check_copies(const dk::KernelTable& table, dk::Storage storage) {
  const Format format = format_of(storage);
  for (const int64_t inputs : {1, 64, 35, 8192}) {
    const Network net = one_synapse_each(inputs, inputs);
    const int64_t batch = ((1 << 16) + inputs - 1) / inputs;
    Memory x = all_patterns();
    x.resize(size_t(2 * batch * inputs));
    const Memory y =
        products(table, net, batch, {"", storage}, x, Array<float>(size_t(inputs), 1.f));
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
      uint16_t found;
      memcpy(&found, &y[2 * bits], 2);
      const double expected = format.value(uint16_t(bits));
      expect(expected, format.value(found), "copying", expected);
    }
  }
}

// x comes out as the gradient of the weights, which is float32: widened, but not narrowed. It is a
// sum over samples (here one), so the sign of zero is lost.
void check_widening(const dk::KernelTable& table, dk::Storage storage) {
  const int64_t count = 1 << 16;
  const Network net = one_synapse_each(count, count);
  const Memory x = all_patterns(), grad = memory_of(Array<float>(size_t(count), 1.f), storage);
  const Array<float> weight(size_t(count), 1.f);
  Array<float> dweight = poisoned<float>(count), ddendrite_bias = poisoned<float>(count);
  dk::BackwardCall<float> call{};
  call.batch = 1;
  call.storage = storage;
  call.grad = grad.data();
  call.x = x.data();
  call.weight = weight.data();
  call.slope = call.soma_slope = 1;
  call.dweight = dweight.data();
  call.ddendrite_bias = ddendrite_bias.data();
  Workspace workspace;
  table.backward_f32(topology(net, nullptr, false), call, runtime(1, workspace));
  for (int64_t bits = 0; bits < count; ++bits) {
    const double expected = format_of(storage).value(uint16_t(bits));
    expect(expected + 0., dweight[bits] + 0., "widening", expected);
  }
  ++cases;
}

// Floats that enter as weights, with x = 1.
void check_narrowing(const dk::KernelTable& table, dk::Storage storage) {
  const Format format = format_of(storage);
  const Array<float> weight = delicate(format);
  const int64_t rows = int64_t(weight.size());
  for (const int64_t batch : {1, 2}) {
    const Memory x = memory_of(Array<float>(size_t(batch), 1.f), storage);
    const Memory y = products(table, one_synapse_each(rows, 1), batch, {"", storage}, x, weight);
    const Array<float> found = numbers_in<float>(y, storage);
    for (int64_t i = 0; i < batch * rows; ++i) {
      const float number = weight[size_t(i % rows)];
      expect_product(batch, format.value(format.nearest(number)), found[i], "narrowing", number);
    }
  }
}

// Floats that enter as x: in a batch of one, in batches that fit the smallest tile, and in others.
void check_round_x(const dk::KernelTable& table) {
  Array<float> x = delicate(kBfloat16);
  const int64_t count = int64_t(x.size());
  for (const int64_t inputs : {count, (count + 15) / 16, int64_t(71)}) {
    const int64_t batch = (count + inputs - 1) / inputs;
    x.resize(size_t(batch * inputs));
    const Precision precision{"", dk::Storage::full, true};
    const Memory y = products(table, one_synapse_each(inputs, inputs), batch, precision,
                              memory_of(x, dk::Storage::full), Array<float>(size_t(inputs), 1.f));
    const Array<float> found = numbers_in<float>(y, dk::Storage::full);
    for (int64_t i = 0; i < count; ++i)
      expect_product(batch, kBfloat16.value(kBfloat16.nearest(x[i])), found[i], "rounding", x[i]);
  }
}

void check_conversions(const dk::KernelTable& table) {
  check_scalars<bf16>(dk::Storage::bf16);
  check_scalars<f16>(dk::Storage::f16);
  for (const dk::Storage storage : {dk::Storage::bf16, dk::Storage::f16}) {
    running = std::string(table.isa) + (storage == dk::Storage::bf16 ? " bfloat16" : " float16") +
              " conversions";
    check_copies(table, storage);
    check_widening(table, storage);
    check_narrowing(table, storage);
  }
  running = std::string(table.isa) + " float32 rounded to bfloat16";
  check_round_x(table);
}

}  // namespace
