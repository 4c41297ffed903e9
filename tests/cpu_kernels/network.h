// Random networks and their transposed plans, written directly from the definition of the plan in
// dendrite_kernels/transposed.py.
#pragma once

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "fenced.h"
#include "kernels.h"

using Random = std::mt19937;

struct Network {
  std::string name;
  int64_t in_features = 0, fan_in = 0;
  Array<int32_t> crow{0}, soma_ptr{0}, columns;
  Array<uint16_t> narrow_columns;  // empty if columns need 32 bits

  int64_t rows() const { return int64_t(crow.size()) - 1; }
  int64_t somas() const { return int64_t(soma_ptr.size()) - 1; }
  int64_t nnz() const { return int64_t(columns.size()); }
};

// lengths: synapses of each dendrite; sizes: dendrites of each soma.
inline Network make_network(const std::string& name, int64_t in_features,
                            const std::vector<int>& lengths, const std::vector<int>& sizes) {
  Network net;
  net.name = name;
  net.in_features = in_features;
  Random random(1);
  for (int length : lengths) {
    int64_t missing = length;
    for (int64_t n = 0; n < in_features; ++n)  // every set of columns is equally likely
      if (int64_t(random() % uint64_t(in_features - n)) < missing) {
        net.columns.push_back(int32_t(n));
        --missing;
      }
    net.crow.push_back(int32_t(net.nnz()));
  }
  for (int size : sizes) net.soma_ptr.push_back(net.soma_ptr.back() + size);
  const bool constant =
      std::all_of(lengths.begin(), lengths.end(), [&](int length) { return length == lengths[0]; });
  if (constant) net.fan_in = lengths[0];
  if (in_features <= 65536) net.narrow_columns.assign(net.columns.begin(), net.columns.end());
  net.crow.shrink_to_fit();
  net.soma_ptr.shrink_to_fit();
  net.columns.shrink_to_fit();
  return net;
}

struct Plan {
  int64_t block_rows, group;
  Array<int64_t> column_ptr{0}, slot_ptr{0};
  Array<int32_t> column, slot, synapse;
  Array<uint16_t> narrow_column, groups, row, narrow_slot, narrow_synapse;
};

inline Plan make_plan(const Network& net, int64_t block_rows, int64_t group) {
  Plan plan;
  plan.block_rows = block_rows;
  plan.group = group;
  plan.slot.resize(size_t(net.nnz()));
  for (int64_t r0 = 0; r0 < net.rows(); r0 += block_rows) {
    std::map<int32_t, std::vector<std::pair<int64_t, int32_t>>>
        synapses;  // column -> row, position
    for (int64_t r = r0; r < std::min(net.rows(), r0 + block_rows); ++r)
      for (int32_t j = net.crow[r]; j < net.crow[r + 1]; ++j)
        synapses[net.columns[j]].push_back({r - r0, j});
    const size_t begin = plan.row.size();
    const int32_t j0 = net.crow[r0], past = net.crow[std::min(net.rows(), r0 + block_rows)] - j0;
    const auto add_slot = [&](int64_t row, int32_t synapse) {
      plan.row.push_back(uint16_t(row));
      plan.synapse.push_back(synapse);
    };
    for (const auto& [column, entries] : synapses) {
      plan.column.push_back(column);
      plan.groups.push_back(uint16_t((entries.size() + group - 1) / group));
      for (const auto& [row, position] : entries) {
        plan.slot[position] = int32_t(plan.row.size() - begin);
        add_slot(row, position - j0);
      }
      while ((plan.row.size() - begin) % group) add_slot(entries[0].first, past);
    }
    while ((plan.row.size() - begin) % 16) add_slot(0, past);
    plan.column_ptr.push_back(int64_t(plan.column.size()));
    plan.slot_ptr.push_back(int64_t(plan.row.size()));
  }
  if (net.in_features <= 65536) plan.narrow_column.assign(plan.column.begin(), plan.column.end());
  plan.narrow_slot.assign(plan.slot.begin(), plan.slot.end());
  plan.narrow_synapse.assign(plan.synapse.begin(), plan.synapse.end());
  for (auto* array : {&plan.column_ptr, &plan.slot_ptr}) array->shrink_to_fit();
  for (auto* array : {&plan.groups, &plan.row}) array->shrink_to_fit();
  for (auto* array : {&plan.column, &plan.synapse}) array->shrink_to_fit();
  return plan;
}

struct Order {
  int64_t group_size;
  Array<int32_t> dendrite, soma, crow{0}, columns;
  Array<uint16_t> narrow_columns;
};

// A random order within each group of `group_size` somas or rows.
inline Order make_order(const Network& net, int64_t group_size, bool of_rows = false) {
  Order order;
  order.group_size = group_size;
  Random random(4);
  for (int64_t s = 0, outputs = of_rows ? net.rows() : net.somas(); s < outputs; s += group_size) {
    const int64_t stop = std::min(outputs, s + group_size);
    const int64_t begin = of_rows ? s : net.soma_ptr[s], end = of_rows ? stop : net.soma_ptr[stop];
    for (int64_t r = begin; r < end; ++r) order.dendrite.push_back(int32_t(r));
    std::shuffle(order.dendrite.begin() + begin, order.dendrite.end(), random);
  }
  for (const int32_t r : order.dendrite) {
    int32_t soma = 0;
    while (net.soma_ptr[soma + 1] <= r) ++soma;
    if (!of_rows) order.soma.push_back(soma);
    for (int32_t j = net.crow[r]; j < net.crow[r + 1]; ++j) order.columns.push_back(net.columns[j]);
    order.crow.push_back(int32_t(order.columns.size()));
  }
  if (net.in_features <= 65536)
    order.narrow_columns.assign(order.columns.begin(), order.columns.end());
  for (auto* array : {&order.dendrite, &order.soma, &order.crow, &order.columns})
    array->shrink_to_fit();
  return order;
}

// The arguments of the kernels; plan may be null.
inline dk::Topology topology(const Network& net, const Plan* plan, bool narrow) {
  dk::Topology t{};
  t.in_features = net.in_features;
  t.rows = net.rows();
  t.somas = net.somas();
  t.nnz = net.nnz();
  t.fan_in = net.fan_in;
  t.crow = net.crow.data();
  t.soma_ptr = net.soma_ptr.data();
  t.narrow = narrow;
  t.columns = narrow ? static_cast<const void*>(net.narrow_columns.data()) : net.columns.data();
  if (!plan) return t;
  t.blocks = int64_t(plan->column_ptr.size()) - 1;
  t.block_rows = plan->block_rows;
  t.group = plan->group;
  t.plan_column_ptr = plan->column_ptr.data();
  t.plan_slot_ptr = plan->slot_ptr.data();
  t.plan_column =
      narrow ? static_cast<const void*>(plan->narrow_column.data()) : plan->column.data();
  t.plan_groups = plan->groups.data();
  t.plan_row = plan->row.data();
  int64_t most_slots = 0;
  for (int64_t i = 0; i < t.blocks; ++i)
    most_slots = std::max(most_slots, t.plan_slot_ptr[i + 1] - t.plan_slot_ptr[i]);
  t.plan_narrow = narrow && most_slots <= 65535;
  t.plan_slot =
      t.plan_narrow ? static_cast<const void*>(plan->narrow_slot.data()) : plan->slot.data();
  t.plan_synapse =
      t.plan_narrow ? static_cast<const void*>(plan->narrow_synapse.data()) : plan->synapse.data();
  return t;
}

inline dk::Topology ordered_topology(const Network& net, const Order& order, bool narrow) {
  dk::Topology t = topology(net, nullptr, narrow);
  t.order = order.dendrite.data();
  t.soma = order.soma.empty() ? nullptr : order.soma.data();
  t.ordered_crow = order.crow.data();
  t.ordered_columns =
      narrow ? static_cast<const void*>(order.narrow_columns.data()) : order.columns.data();
  t.group_size = order.group_size;
  return t;
}
