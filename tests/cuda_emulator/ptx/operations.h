// What PTX computes and C++ has no operator for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace ptx {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
constexpr uint32_t kBits = 8 * sizeof(T);

inline bool invert(bool a) { return !a; }
template <class T>
T invert(T a) {
  return T(~a);
}

template <class T>
T absolute(T a) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fabs(a);
  else
    return a < 0 ? T(-Unsigned<T>(a)) : a;
}

// Of a number and a NaN it is the number; -0 is less than +0.
template <class T>
T minimum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a == b) return std::signbit(a) ? a : b;
    if (a != a) return b;
    if (b != b) return a;
  }
  return a < b ? a : b;
}
template <class T>
T maximum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a == b) return std::signbit(a) ? b : a;
    if (a != a) return b;
    if (b != b) return a;
  }
  return a < b ? b : a;
}
template <class T>
T nan_or(T a, T b, T result) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : result;
}

// The host traps on these; devices do not.
template <class T>
T divide(T a, T b) {
  if (b == 0) return T(-1);
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return T(-Unsigned<T>(a));
  return T(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return T(a % b);
}

template <class T>
T multiply_high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return T(Wide(a) * Wide(b) >> kBits<T>);
}

template <class T>
T shift_left(T a, uint32_t by) {
  return by < kBits<T> ? T(Unsigned<T>(a) << by) : T(0);
}
template <class T>
T shift_right(T a, uint32_t by) {
  return by < kBits<T> ? T(a >> by) : T(a < 0 ? -1 : 0);
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) << by >> 32);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) >> by);
}

// `length` bits from bit `from` on, with their sign if T has one. Only the low bytes of both count.
template <class T>
T extract(T a, uint32_t from, uint32_t length) {
  from &= 0xff;
  length &= 0xff;
  if (length == 0) return 0;
  const uint32_t sign_at = std::min(from + length - 1, kBits<T> - 1);
  const bool sign = std::is_signed_v<T> && (Unsigned<T>(a) >> sign_at & 1);
  Unsigned<T> result = shift_right(Unsigned<T>(a), from);
  if (length < kBits<T>) result &= (Unsigned<T>(1) << length) - 1;
  const uint32_t valid = from < kBits<T> ? std::min(length, kBits<T> - from) : 0;
  if (sign && valid < kBits<T>) result |= Unsigned<T>(~Unsigned<T>(0)) << valid;
  return T(result);
}
template <class T>
T insert(T a, T into, uint32_t at, uint32_t length) {
  at &= 0xff;
  length &= 0xff;
  const T ones = length < kBits<T> ? T((T(1) << length) - 1) : T(~T(0));
  const T mask = shift_left(ones, at);
  return (into & ~mask) | (shift_left(a, at) & mask);
}

template <class T>
T reverse(T a) {
  T result = 0;
  for (uint32_t i = 0; i < kBits<T>; ++i) result |= (a >> i & 1) << (kBits<T> - 1 - i);
  return result;
}
template <class T>
uint32_t count_ones(T a) {
  return uint32_t(__builtin_popcountll(Unsigned<T>(a)));
}
template <class T>
uint32_t leading_zeros(T a) {
  return a ? uint32_t(__builtin_clzll(Unsigned<T>(a))) - (64 - kBits<T>) : kBits<T>;
}
// Of a signed number it is the highest bit that differs from the sign.
template <class T>
uint32_t highest_bit(T a) {
  const Unsigned<T> bits = Unsigned<T>(a < 0 ? T(~a) : a);
  return bits ? kBits<T> - 1 - leading_zeros(bits) : 0xffffffffu;
}

// Bit i of the result is the bit of `table` that bits i of a, b, c select.
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

// Each half byte of the selector names one of eight bytes; its high bit spreads that byte's sign.
inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t select = selector >> (4 * i);
    uint8_t byte = uint8_t(bytes >> (8 * (select & 7)));
    if (select & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= uint32_t(byte) << (8 * i);
  }
  return result;
}

// Out of range becomes the nearest integer, NaN becomes 0.
template <class To, class From>
To to_integer(From a) {
  if (a != a) return 0;
  if (a <= From(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (a >= From(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return To(a);
}
template <class To, class From>
To saturate(From a) {
  using Limits = std::numeric_limits<To>;
  return To(std::clamp(__int128(a), __int128(Limits::min()), __int128(Limits::max())));
}

}  // namespace ptx
