// Conversions of stored numbers by the definition of IEEE 754: in double, one at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "fenced.h"
#include "kernels.h"

struct Format {
  int mantissa, exponent;  // bits of each; the sign is the highest

  // 2^lowest() is the smallest positive number.
  int lowest() const { return 2 - (1 << (exponent - 1)) - mantissa; }
  uint32_t infinity() const { return ((1u << exponent) - 1) << mantissa; }

  double value(uint16_t bits) const {
    const uint32_t fraction = bits & ((1u << mantissa) - 1), rest = bits & 0x7fff;
    const int field = int(rest >> mantissa);
    const double magnitude =
        rest > infinity()    ? NAN
        : rest == infinity() ? INFINITY
        : field == 0 ? std::ldexp(double(fraction), lowest())
                     : std::ldexp(double(fraction + (1u << mantissa)), lowest() + field - 1);
    return std::copysign(magnitude, bits & 0x8000 ? -1. : 1.);
  }

  // The nearest number; of two equally near ones, that whose last bit is zero.
  uint16_t nearest(double v) const {
    const uint32_t sign = std::signbit(v) ? 0x8000 : 0;
    if (std::isnan(v)) return 0x7fff;
    if (std::isinf(v)) return uint16_t(sign | infinity());
    if (v == 0) return uint16_t(sign);
    int exponent_of_v;
    std::frexp(v, &exponent_of_v);
    const int unit = std::max(exponent_of_v - 1 - mantissa, lowest());
    const double units = std::nearbyint(std::ldexp(std::abs(v), -unit));
    const double bits = units + std::ldexp(double(unit - lowest()), mantissa);
    return uint16_t(sign | uint32_t(std::min(bits, double(infinity()))));
  }
};

constexpr Format kBfloat16{7, 8}, kFloat16{10, 5};

inline Format format_of(dk::Storage storage) {
  return storage == dk::Storage::bf16 ? kBfloat16 : kFloat16;
}

// Stored numbers that a kernel reads or writes.
using Memory = Array<char>;

template <class T>
size_t bytes_of_one(dk::Storage storage) {
  return storage == dk::Storage::full ? sizeof(T) : 2;
}

template <class T>
Memory memory_of(const Array<T>& numbers, dk::Storage storage) {
  Memory memory(numbers.size() * bytes_of_one<T>(storage));
  char* out = memory.data();
  for (const T& number : numbers) {
    const uint16_t bits = storage == dk::Storage::full ? 0 : format_of(storage).nearest(number);
    if (storage == dk::Storage::full)
      memcpy(out, &number, sizeof number);
    else
      memcpy(out, &bits, sizeof bits);
    out += bytes_of_one<T>(storage);
  }
  return memory;
}

template <class T>
Array<T> numbers_in(const Memory& memory, dk::Storage storage) {
  Array<T> numbers(memory.size() / bytes_of_one<T>(storage));
  const char* in = memory.data();
  for (T& number : numbers) {
    uint16_t bits;
    if (storage == dk::Storage::full) {
      memcpy(&number, in, sizeof number);
    } else {
      memcpy(&bits, in, sizeof bits);
      number = T(format_of(storage).value(bits));
    }
    in += bytes_of_one<T>(storage);
  }
  return numbers;
}

// Memory for results: NaN in every format.
template <class T>
Memory poisoned_memory(int64_t count, dk::Storage storage) {
  return Memory(size_t(count) * bytes_of_one<T>(storage), char(0xff));
}

inline double rounded(double v, dk::Storage storage) {
  return storage == dk::Storage::full ? v : format_of(storage).value(format_of(storage).nearest(v));
}
