// Checks of every access that a translated kernel makes, byte by byte.
//
// Bounds: a tensor that was announced for the launch gets addresses of its own, far from those of
// all others, so that no overrun of one lands in another. Order: for every byte the last write and
// the reads since are kept; a new access must come behind those that it conflicts with. Barriers
// order threads: the block's by counting them (`epoch`), a warp's by vector clocks. Shuffles and
// votes order nothing, as CUDA's programming guide says. Blocks are never ordered.
//
// A thread's clock holds for each lane of its warp how many warp barriers of that lane it knows to
// be over; for itself, one more. So what a lane did at its clock c is known to those with clock
// >= c for that lane.
//
// Not seen: what ptxas makes of the PTX; reads of global memory that nobody wrote (the NaN that the
// check fills it with shows them in the results); pointers that a kernel loads from memory rather
// than from its parameter count as outside; atomic operations are unknown to the translator.
#include "runtime.h"

#include <array>
#include <map>
#include <string>

namespace ptx {
namespace {

struct Moment {
  int line = 0;  // of the PTX; 0: never happened
  uint32_t block, thread, epoch, clock;
};

// A byte. The reads are those of `read.block` in `read.epoch`, and those of other blocks.
struct Cell {
  Moment write, read;  // the last ones
  uint32_t lanes = 0;  // that read, of the last reader's warp
  bool other_warps = false, other_blocks = false;
};

struct Tensor {
  uint64_t host, bytes, address;
  Cell* cells;
};
constexpr int kTensorShift = 40;  // tensor i has the addresses from (i + 1) << 40 on
constexpr size_t kMostTensors = 64;

// Where lanes of a warp exchange values. They alternate between two exchanges: nobody writes to one
// before all have read what it held.
struct Exchange {
  uint32_t value[32];
  uint32_t clock[32];
};
struct Meeting {
  uint32_t members = 0, arrived = 0;
  int line = 0;
  unsigned generation = 0;
  Exchange exchange[2];
};

struct State {
  std::vector<Kernel*> kernels;
  std::vector<Tensor> tensors;
  std::vector<Cell> shared;
  std::vector<Thread> threads;
  std::vector<std::array<Meeting, 32>> meetings;  // of each warp, by the lowest lane
  Kernel* kernel = nullptr;
  long launch = 0, launches = 0, accesses = 0;
  uint32_t block = 0;
  int barrier_line = 0;
  std::map<std::string, long> faults{
      {"race", 0}, {"misaligned", 0}, {"outside", 0}, {"uninitialised", 0}, {"diverged", 0}};
};
State& state() {
  static State instance;
  return instance;
}

emulator::Machine& machine() { return emulator::machine; }
uint32_t epoch() { return machine().barrier.generation; }

template <class... Values>
void report(const char* kind, const char* format, Values... values) {
  if (state().faults[kind]++ >= 10) return;
  std::fprintf(stderr, "PTX %s: ", kind);
  std::fprintf(stderr, format, values...);
  std::fprintf(stderr, ": %s\n", state().kernel->name);
}

void begin_launch(Kernel& kernel) {
  State& s = state();
  s.launch = machine().launches;
  s.kernel = &kernel;
  ++kernel.launches;
  ++s.launches;
  for (Tensor& tensor : s.tensors) {
    std::free(tensor.cells);
    tensor.cells = static_cast<Cell*>(std::calloc(tensor.bytes, sizeof(Cell)));
  }
}

void begin_block() {
  State& s = state();
  s.block = machine().block.x;
  s.shared.assign(machine().shared_bytes, Cell{});
  s.threads.assign(machine().threads.x, Thread{});
  s.meetings.assign((machine().threads.x + 31) / 32, {});
}

bool is_before(const Moment& then, const Thread& me) {
  if (then.line == 0) return true;
  if (then.block != me.block) return false;
  if (then.thread == me.index || then.epoch < epoch()) return true;
  return then.thread / 32 == me.warp && me.clock[then.thread % 32] >= then.clock;
}

bool know_lanes(const Cell& cell, const Thread& me) {
  for (uint32_t lane = 0; lane < 32; ++lane)
    if (cell.lanes >> lane & 1 && lane != me.lane && me.clock[lane] < cell.read.clock) return false;
  return true;
}

bool reads_are_before(const Cell& cell, const Thread& me) {
  if (cell.read.line == 0) return true;
  if (cell.other_blocks || cell.read.block != me.block) return false;
  if (cell.read.epoch < epoch()) return true;
  return !cell.other_warps && cell.read.thread / 32 == me.warp && know_lanes(cell, me);
}

void note_read(Cell& cell, const Thread& me, const Moment& now) {
  const Moment before = cell.read;
  cell.read = now;
  if (before.line && before.block != now.block) cell.other_blocks = true;
  if (!before.line || before.block != now.block || before.epoch != now.epoch) {
    cell.lanes = 0;
    cell.other_warps = false;
  } else if (before.thread / 32 != me.warp) {
    cell.lanes = 0;
    cell.other_warps = true;
  } else if (before.clock != now.clock) {
    // Reads that are over count no more; others, only of lanes that synchronise apart, now count as
    // late as the latest of them.
    if (know_lanes(cell, me)) cell.lanes = 0;
    cell.read.clock = cell.lanes ? std::max(before.clock, now.clock) : now.clock;
  }
  cell.lanes |= 1u << me.lane;
}

struct Place {
  Cell* cells;  // null: nowhere
  unsigned char* host;
  const char* space;
  uint64_t offset;
  bool is_shared;
};

void report_race(const char* what, const Place& place, const Moment& now, const Moment& then) {
  report("race",
         "%s, %s, byte %llu: line %d, thread %u of block %u; line %d, thread %u of block %u", what,
         place.space, static_cast<unsigned long long>(place.offset), now.line, now.thread,
         now.block, then.line, then.thread, then.block);
}

void touch(const Place& place, size_t bytes, const Thread& me, int line, bool is_write) {
  const Moment now{line, me.block, me.index, epoch(), me.clock[me.lane]};
  state().accesses += long(bytes);
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = place.cells[i];
    const Place byte{&cell, nullptr, place.space, place.offset + i, place.is_shared};
    if (!is_before(cell.write, me))
      report_race(is_write ? "write after write" : "read after write", byte, now, cell.write);
    if (is_write) {
      if (!reads_are_before(cell, me)) report_race("write after read", byte, now, cell.read);
      cell = Cell{};
      cell.write = now;
    } else {
      note_read(cell, me, now);
    }
  }
}

Place place_of(Space space, uint64_t address, size_t bytes) {
  State& s = state();
  const bool in_window = space == generic && address >> 32 == kSharedWindow >> 32;
  if (space == shared || in_window) {
    const uint64_t offset = in_window ? address - kSharedWindow : address;
    const bool inside = offset <= s.shared.size() && bytes <= s.shared.size() - offset;
    return {inside ? s.shared.data() + offset : nullptr, machine().shared + offset, "shared memory",
            offset, true};
  }
  const uint64_t index = (address >> kTensorShift) - 1;
  if (index >= s.tensors.size()) return {nullptr, nullptr, "global memory", address, false};
  const Tensor& t = s.tensors[index];
  const uint64_t offset = address - t.address;
  const bool inside = offset <= t.bytes && bytes <= t.bytes - offset;
  return {inside ? t.cells + offset : nullptr, reinterpret_cast<unsigned char*>(t.host) + offset,
          "a tensor", offset, false};
}

bool all_written(const Cell* cells, size_t bytes) {
  return std::all_of(cells, cells + bytes, [](const Cell& cell) { return cell.write.line != 0; });
}

// Where the bytes lie, or bytes that nobody needs if they lie nowhere.
void* access(Thread& me, int line, Space space, uint64_t address, size_t bytes, bool is_write) {
  static unsigned char nowhere[64];
  const Place place = place_of(space, address, bytes);
  const auto offset = static_cast<unsigned long long>(place.offset);
  if (address % bytes)
    report("misaligned", "%zu bytes in %s from byte %llu on: line %d, thread %u of block %u", bytes,
           place.space, offset, line, me.index, me.block);
  if (!place.cells) {
    report("outside", "%zu bytes in %s from byte %lld on: line %d, thread %u of block %u", bytes,
           place.space, offset, line, me.index, me.block);
    std::memset(nowhere, 0, sizeof nowhere);
    return nowhere;
  }
  if (!is_write && place.is_shared && !all_written(place.cells, bytes))
    report("uninitialised",
           "%zu bytes of shared memory from %llu on: line %d, thread %u of block %u", bytes, offset,
           line, me.index, me.block);
  touch(place, bytes, me, line, is_write);
  return place.host;
}

[[noreturn]] void stop() {
  std::fprintf(stderr, "PTX: cannot go on\n");
  std::_Exit(3);
}

// All threads wait: says for whom.
void explain_and_stop() {
  const State& s = state();
  for (size_t warp = 0; warp < s.meetings.size(); ++warp)
    for (const Meeting& m : s.meetings[warp])
      if (m.arrived)
        report("diverged", "lanes %08x of warp %zu never come to line %d", m.members & ~m.arrived,
               warp, m.line);
  if (machine().barrier.arrived)
    report("diverged", "only %d of %u threads come to the barrier in line %d",
           machine().barrier.arrived, machine().threads.x, s.barrier_line);
  stop();
}

// Waits for all members, which must come to the same line; returns what they brought.
Exchange& meet(Thread& me, int line, uint32_t members, uint32_t value, bool orders_memory) {
  if (!(members >> me.lane & 1)) {
    report("diverged", "line %d: lane %u is none of %08x", line, me.lane, members);
    stop();
  }
  Meeting& meeting = state().meetings[me.warp][size_t(__builtin_ctz(members))];
  Exchange& exchange = meeting.exchange[meeting.generation % 2];
  if (!meeting.arrived) {
    meeting.members = members;
    meeting.line = line;
    exchange = {};
  } else if (meeting.members != members || meeting.line != line) {
    report("diverged", "lanes %08x are in line %d, lane %u is in line %d", meeting.arrived,
           meeting.line, me.lane, line);
    stop();
  }
  exchange.value[me.lane] = value;
  for (int i = 0; orders_memory && i < 32; ++i)
    exchange.clock[i] = std::max(exchange.clock[i], me.clock[i]);
  const unsigned generation = meeting.generation;
  meeting.arrived |= 1u << me.lane;
  if (meeting.arrived == members) {
    meeting.arrived = 0;
    ++meeting.generation;
    ++machine().progress;
  }
  while (meeting.generation == generation) emulator::yield();
  return exchange;
}

}  // namespace

Kernel::Kernel(const char* name_, void (*run_)(const void*)) : name(name_), run(run_) {
  state().kernels.push_back(this);
  emulator::explain_deadlock = explain_and_stop;
}

Thread& enter(Kernel& kernel) {
  State& s = state();
  const bool is_new = s.launch != machine().launches;
  if (is_new) begin_launch(kernel);
  if (is_new || s.block != machine().block.x) begin_block();
  const uint32_t index = threadIdx.x;
  Thread& me = s.threads[index];
  me = {s.block, index, index % 32, index / 32, {}};
  me.clock[me.lane] = 1;
  return me;
}

const void* read(Thread& me, int line, Space space, uint64_t address, size_t bytes) {
  return access(me, line, space, address, bytes, false);
}
void* write(Thread& me, int line, Space space, uint64_t address, size_t bytes) {
  return access(me, line, space, address, bytes, true);
}

uint64_t checked_pointer(uint64_t value) {
  for (const Tensor& t : state().tensors)
    if (value - t.host < t.bytes) return t.address + (value - t.host);
  return value;
}

void block_barrier(Thread& me, int line) {
  int& expected = state().barrier_line;
  if (!machine().barrier.arrived) expected = line;
  if (line != expected)
    report("diverged", "barriers in lines %d and %d, thread %u", expected, line, me.index);
  ::__syncthreads();
}

void warp_barrier(Thread& me, int line, uint32_t members) {
  const Exchange& exchange = meet(me, line, members, 0, true);
  for (int i = 0; i < 32; ++i) me.clock[i] = std::max(me.clock[i], exchange.clock[i]);
  ++me.clock[me.lane];
}

uint32_t shuffle(Thread& me, int line, char mode, bool& inside, uint32_t value, uint32_t at,
                 uint32_t limits, uint32_t members) {
  const Exchange& exchange = meet(me, line, members, value, false);
  const int lane = int(me.lane), by = int(at & 31), segment = int(limits >> 8 & 31);
  const int first = lane & segment, last = first | (int(limits & 31) & ~segment);
  int from = lane;
  if (mode == 'b') from = lane ^ by;
  if (mode == 'i') from = first | (by & ~segment);
  if (mode == 'u') from = lane - by;
  if (mode == 'd') from = lane + by;
  inside = mode == 'u' ? from >= last : from <= last;
  if (!inside) from = lane;
  if (!(members >> from & 1))
    report("diverged", "line %d: lane %d reads lane %d, none of %08x", line, lane, from, members);
  return exchange.value[from];
}

uint32_t vote_ballot(Thread& me, int line, bool vote, uint32_t members) {
  const Exchange& exchange = meet(me, line, members, vote, false);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= exchange.value[i] << i;
  return result & members;
}
bool vote_any(Thread& me, int line, bool vote, uint32_t members) {
  return vote_ballot(me, line, vote, members) != 0;
}
bool vote_all(Thread& me, int line, bool vote, uint32_t members) {
  return vote_ballot(me, line, vote, members) == members;
}
bool vote_uni(Thread& me, int line, bool vote, uint32_t members) {
  const uint32_t votes = vote_ballot(me, line, vote, members);
  return votes == 0 || votes == members;
}

int gather(Thread& me, int line, uint32_t value, uint32_t members, uint32_t (&values)[32]) {
  const Exchange& exchange = meet(me, line, members, value, false);
  int count = 0;
  for (int i = 0; i < 32; ++i)
    if (members >> i & 1) values[count++] = exchange.value[i];
  return count;
}

}  // namespace ptx

// For Python, by ctypes.

// The tensors of the next launch: (address, bytes) each. Equal ones count once.
extern "C" bool ptx_tensors(const uint64_t* ranges, int count) {
  auto& tensors = ptx::state().tensors;
  for (ptx::Tensor& t : tensors) std::free(t.cells);
  tensors.clear();
  for (int i = 0; i < count; ++i) {
    const uint64_t host = ranges[2 * i], bytes = ranges[2 * i + 1];
    bool is_new = bytes > 0;
    for (const ptx::Tensor& t : tensors) {
      if (t.host == host && t.bytes == bytes)
        is_new = false;
      else if (t.host < host + bytes && host < t.host + t.bytes)
        return false;
    }
    const uint64_t base = uint64_t(tensors.size() + 1) << ptx::kTensorShift;
    if (is_new) tensors.push_back({host, bytes, base | (host & 0xfff), nullptr});
  }
  return tensors.size() <= ptx::kMostTensors;
}

extern "C" void ptx_set_order(int order) { emulator::set_order(order); }

extern "C" bool ptx_launch(const char* name, unsigned blocks, unsigned threads, size_t shared_bytes,
                           const void* parameter) {
  for (ptx::Kernel* kernel : ptx::state().kernels)
    if (std::string(kernel->name) == name) {
      emulator::launch(blocks, threads, shared_bytes, [&] { kernel->run(parameter); });
      return true;
    }
  return false;
}

// JSON: launches of each entry point, numbers of accesses and faults.
extern "C" const char* ptx_report() {
  static std::string text;
  const ptx::State& s = ptx::state();
  text = "{\"launches\": {";
  std::map<std::string, long> launches;
  for (const ptx::Kernel* kernel : s.kernels) launches[kernel->name] += kernel->launches;
  const auto list = [](const std::map<std::string, long>& values) {
    std::string result;
    for (const auto& [name, value] : values)
      result += (result.empty() ? "\"" : ", \"") + name + "\": " + std::to_string(value);
    return result;
  };
  text += list(launches) + "}, \"faults\": {" + list(s.faults) + "}";
  text += ", \"untranslated\": " + std::to_string(emulator::machine.launches - s.launches);
  text += ", \"accesses\": " + std::to_string(s.accesses) + "}";
  return text.c_str();
}
