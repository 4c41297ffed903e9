// Python module _cuda: checks every tensor and starts kernels on the stream that it is given. The
// caller (backends/cuda) allocates everything, workspaces too, as torch tensors.
#include <pybind11/pybind11.h>

#include <cmath>
#include <vector>

#include "launch.h"
#include "runtime.h"
#include "tensor.h"

namespace py = pybind11;

namespace dk {
namespace {

void require(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA kernel launch: ") + error);
}

void configure(const py::capsule& exchange_api) {
  const auto* api = static_cast<const DLExchangeAbi*>(
      PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  while (api && api->major > 1) api = api->previous;
  if (!api || api->major != 1 || !api->borrow)
    throw py::import_error(
        "Expected torch to offer version 1 of the DLPack exchange table, got none");
  exchange = api;
}

// A plan as Python keeps it.
struct Plan {
  TilePlan tile;
  int32_t parts, tile_groups;
};

Plan make_plan(int vec, int groups, bool shared, int64_t blocks, int threads, int32_t parts,
               int32_t tile_groups, bool staged) {
  if (parts < 1 || tile_groups < 1 || threads < 32 || threads > 1024 || threads % 32)
    throw py::value_error("Expected a plan with whole warps, parts and groups, got another");
  return {{vec, groups, shared, false, staged, blocks, threads}, parts, tile_groups};
}

int32_t length(py::handle tensor, const char* name) {
  const DLTensorAbi t = borrow(tensor, name);
  return t.ndim == 1 ? int32_t(t.shape[0]) : -1;
}

// Packed synapses on a device (arguments.h says what is packed); keeps its tensors alive.
struct Packed {
  Packed(int32_t team_bits, py::object outputs, py::object bundles, py::object row_table,
         py::object steps, py::object index, py::object dendrite, py::object source_tensor,
         int32_t row_groups, int32_t row_count, int32_t output_count)
      : kept{outputs, bundles, row_table, steps, index, dendrite, source_tensor},
        groups(row_groups),
        rows(row_count),
        output_count(output_count) {
    synapses.team_bits = team_bits;
    synapses.items = length(bundles, "bundles") - 1;
    synapses.bundle_count = length(steps, "steps") - 1;
    if (groups < 1 || team_bits < 0 || groups >> team_bits < 1)
      throw py::value_error("Expected teams of no more than all groups, got others");
    const int64_t teams = groups >> team_bits;
    synapses.outputs = check.pointer<int32_t>(outputs, "outputs", {synapses.items * teams});
    synapses.bundles = check.pointer<int32_t>(bundles, "bundles", {int64_t(synapses.items) + 1});
    synapses.rows =
        check.pointer<int32_t>(row_table, "rows", {int64_t(synapses.bundle_count) * groups});
    synapses.steps = check.pointer<int32_t>(steps, "steps", {int64_t(synapses.bundle_count) + 1});
    const DLTensorAbi t = borrow(index, "index");
    synapses.slots = t.ndim == 1 ? t.shape[0] : -1;
    narrow = is_type<int16_t>(t);
    synapses.index = indices(index, "index", narrow);
    has_dendrite = !dendrite.is_none();
    if (has_dendrite) {
      staged = is_type<int16_t>(borrow(dendrite, "dendrite"));
      synapses.dendrite = indices(dendrite, "dendrite", staged);
    }
    source = check.pointer_or_null<int32_t>(source_tensor, "source", {synapses.slots});
  }
  const void* indices(py::handle tensor, const char* name, bool in_16_bits) {
    if (in_16_bits) return check.pointer<int16_t>(tensor, name, {synapses.slots}, 16);
    return check.pointer<int32_t>(tensor, name, {synapses.slots}, 16);
  }
  std::vector<py::object> kept;
  Checker check;
  Synapses synapses{};
  bool narrow, has_dendrite, staged = false;
  int32_t groups;  // of lanes: rows of a bundle
  int32_t rows, output_count;
  const int32_t* source;

  int32_t chunk() const { return groups == 1 ? 8 : 4; }  // as Kind::kChunk
};

// Runs f(T(), x's sizes) for the dtype of x.
template <class F>
void dispatch(py::handle x, const char* name, const F& f) {
  const DLTensorAbi t = borrow(x, name);
  if (t.ndim != 2) throw py::value_error(std::string(name) + ": Expected 2 dimensions, got others");
  const int64_t batch = t.shape[0], columns = t.shape[1];
  if (is_type<float>(t))
    f(float(), batch, columns);
  else if (is_type<double>(t))
    f(double(), batch, columns);
  else if (is_type<bf16>(t))
    f(bf16(), batch, columns);
  else if (is_type<f16>(t))
    f(f16(), batch, columns);
  else
    throw py::type_error(std::string(name) +
                         ": Expected dtype float32, float64, bfloat16 or float16, got another");
}

int32_t bits_of(int64_t power) {
  int32_t bits = 0;
  while (power >> bits > 1) ++bits;
  return bits;
}

int64_t words(int64_t batch) { return (batch + 31) / 32; }

int64_t samples_of(const Plan& plan) { return int64_t(32 / plan.tile.groups) * plan.tile.vec; }

int64_t tiles_of(const Plan& plan, int64_t batch) {
  return (batch + samples_of(plan) - 1) / samples_of(plan);
}

void check_grid(const Plan& plan, int64_t expected, const Packed& packed) {
  if (plan.tile.blocks != expected)
    throw py::value_error("Expected a plan for " + std::to_string(expected) + " blocks, got " +
                          std::to_string(plan.tile.blocks));
  if (packed.groups != plan.tile.groups)
    throw py::value_error("Expected synapses packed for the plan, got others");
}

TilePlan with_width(const Plan& plan, const Packed& packed) {
  TilePlan tile = plan.tile;
  tile.narrow = packed.narrow;
  return tile;
}

void forward(const Packed& packed, py::handle x, py::handle tiles, int32_t tile_rows,
             py::handle weight, py::handle dendrite_bias, py::handle cable, py::handle soma_bias,
             double slope, double soma_slope, py::handle y, py::handle signs, const Plan* plan,
             int64_t few_blocks, uintptr_t stream) {
  dispatch(x, "x", [&](auto zero, int64_t batch, int64_t inputs) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    Checker check = packed.check;
    const int64_t rows = packed.rows, outputs = packed.output_count;
    ForwardArgs<T> args{};
    args.x = check.pointer<T>(x, "x", {batch, inputs});
    args.synapses = packed.synapses;
    args.weight = check.pointer<A>(weight, "packed weight", {packed.synapses.slots}, 16);
    args.dendrite_bias = check.pointer_or_null<A>(dendrite_bias, "dendrite_bias", {rows});
    args.cable = check.pointer_or_null<A>(cable, "cable_weight", {rows});
    if (!args.cable && outputs != rows)
      throw py::value_error("Expected synapses packed without somas, got some with them");
    args.soma_bias = check.pointer_or_null<A>(soma_bias, "soma_bias", {outputs});
    args.y = check.pointer<T>(y, "y", {batch, outputs});
    args.signs = reinterpret_cast<uint32_t*>(
        check.pointer_or_null<int32_t>(signs, "signs", {words(batch), rows}));
    args.batch = batch;
    args.inputs = int32_t(inputs);
    args.tile_rows = tile_rows;
    args.rows = int32_t(rows);
    args.outputs = int32_t(outputs);
    args.slope = A(slope);
    args.soma_slope = A(soma_slope);
    const DeviceGuard guard(check.device());
    const Stream on = reinterpret_cast<Stream>(stream);
    if (!plan) {
      require(Launcher<T>::forward_few(packed.narrow, few_blocks, args, on));
      return;
    }
    const int64_t tile_count = tiles_of(*plan, batch);
    if (!plan->tile.shared)
      args.tiles = check.pointer<T>(tiles, "tiles", {tile_count, tile_rows, samples_of(*plan)}, 16);
    args.parts = plan->parts;
    check_grid(*plan, tile_count * plan->parts, packed);
    require(Launcher<T>::forward(with_width(*plan, packed), args, on));
  });
}

void backward_weight(const Packed& packed, py::handle x, py::handle tiles, int32_t tile_rows,
                     py::handle grad_v, py::handle signs, double slope, py::handle partial,
                     py::handle partial_row, py::handle partial_soma, const Plan& plan,
                     uintptr_t stream) {
  dispatch(x, "x", [&](auto zero, int64_t batch, int64_t inputs) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    Checker check = packed.check;
    const int64_t rows = packed.rows, outputs = packed.output_count;
    const int64_t tile_count = tiles_of(plan, batch), samples = samples_of(plan);
    WeightArgs<T> args{};
    args.x = check.pointer<T>(x, "x", {batch, inputs});
    if (!plan.tile.shared)
      args.tiles = check.pointer<T>(tiles, "tiles", {tile_count, tile_rows, samples}, 16);
    args.grad_v = check.pointer<A>(grad_v, "grad tiles", {tile_count, outputs, samples}, 16);
    args.synapses = packed.synapses;
    args.signs = reinterpret_cast<uint32_t*>(
        check.pointer_or_null<int32_t>(signs, "signs", {words(batch), rows}));
    args.partial_soma =
        check.pointer_or_null<A>(partial_soma, "partial of soma_bias", {plan.tile_groups, outputs});
    args.partial = check.pointer<A>(partial, "partial", {plan.tile_groups, packed.synapses.slots});
    args.partial_row =
        check.pointer<A>(partial_row, "partial of dendrite_bias", {plan.tile_groups, rows});
    args.batch = batch;
    args.inputs = int32_t(inputs);
    args.tile_rows = tile_rows;
    args.rows = int32_t(rows);
    args.outputs = int32_t(outputs);
    args.tile_count = int32_t(tile_count);
    args.parts = plan.parts;
    args.groups = plan.tile_groups;
    args.slope = A(slope);
    check_grid(plan, int64_t(plan.parts) * plan.tile_groups, packed);
    const DeviceGuard guard(check.device());
    require(Launcher<T>::weight(with_width(plan, packed), args, reinterpret_cast<Stream>(stream)));
  });
}

// Adam's hyperparameters, as torch.optim names them. `decoupled`: those of AdamW.
struct Adam {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;
};

template <class A>
AdamArgs<A> adam_args(const Adam& adam) {
  AdamArgs<A> args{};
  args.lr = A(adam.lr);
  args.decay = A(adam.decoupled ? 1 - adam.lr * adam.weight_decay : 1);
  args.l2 = A(adam.decoupled ? 0 : adam.weight_decay);
  args.beta2 = A(adam.beta2);
  args.rest1 = A(1 - adam.beta1);
  args.rest2 = A(1 - adam.beta2);
  args.log_beta1 = A(std::log(adam.beta1));
  args.log_beta2 = A(std::log(adam.beta2));
  args.eps = A(adam.eps);
  return args;
}

// `like` has the dtype of the activations; everything here is in their accumulator's type. With
// `adam` the weight is stepped, and `dweight` is None.
void finish_weight(const Packed& packed, py::handle like, py::handle partial,
                   py::handle partial_row, py::handle partial_soma, py::handle weight,
                   py::handle dendrite_bias, py::handle cable, int64_t synapses, py::handle dweight,
                   py::handle ddendrite_bias, py::handle dcable, py::handle dsoma_bias,
                   int32_t groups, const Adam* adam, py::handle exp_avg, py::handle exp_avg_sq,
                   py::handle steps, uintptr_t stream) {
  dispatch(like, "x", [&](auto zero, int64_t, int64_t) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    Checker check = packed.check;
    const int64_t rows = packed.rows;
    FinishArgs<A> args{};
    args.synapses = packed.synapses;
    args.partial = check.pointer<A>(partial, "partial", {groups, packed.synapses.slots});
    args.partial_row = check.pointer<A>(partial_row, "partial of dendrite_bias", {groups, rows});
    args.weight = check.pointer<A>(weight, "synapse_weight", {synapses});
    args.dendrite_bias = check.pointer_or_null<A>(dendrite_bias, "dendrite_bias", {rows});
    args.source = packed.source;
    if (adam) {
      args.adam = adam_args<A>(*adam);
      args.adam.weight = check.pointer<A>(weight, "synapse_weight", {synapses});
      args.adam.exp_avg = check.pointer<A>(exp_avg, "exp_avg", {synapses});
      args.adam.exp_avg_sq = check.pointer<A>(exp_avg_sq, "exp_avg_sq", {synapses});
      args.adam.steps = check.pointer<float>(steps, "step", {});
    } else {
      args.dweight = check.pointer<A>(dweight, "grad of synapse_weight", {synapses});
    }
    args.ddendrite_bias = check.pointer<A>(ddendrite_bias, "grad of dendrite_bias", {rows});
    args.cable = check.pointer_or_null<A>(cable, "cable_weight", {rows});
    if (args.cable) {
      const int64_t somas = packed.output_count;
      args.partial_soma = check.pointer<A>(partial_soma, "partial of soma_bias", {groups, somas});
      args.dcable = check.pointer<A>(dcable, "grad of cable_weight", {rows});
      args.dsoma_bias = check.pointer<A>(dsoma_bias, "grad of soma_bias", {somas});
      args.somas = int32_t(somas);
    }
    args.rows = int32_t(rows);
    args.groups = groups;
    args.row_groups = packed.groups;
    args.chunk = packed.chunk();
    const DeviceGuard guard(check.device());
    require(Launcher<T>::finish(args, reinterpret_cast<Stream>(stream)));
  });
}

void backward_input(const Packed& transposed, int32_t rows, int32_t tile_rows, py::handle grad_v,
                    py::handle signs, py::handle weight, double slope, py::handle dx,
                    const Plan& plan, uintptr_t stream) {
  dispatch(dx, "grad of x", [&](auto zero, int64_t batch, int64_t inputs) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    Checker check = transposed.check;
    const int64_t tile_count = tiles_of(plan, batch);
    InputArgs<T> args{};
    args.grad_v =
        check.pointer<A>(grad_v, "grad tiles", {tile_count, tile_rows, samples_of(plan)}, 16);
    args.synapses = transposed.synapses;
    args.weight = check.pointer<A>(weight, "packed weight", {transposed.synapses.slots}, 16);
    args.signs = reinterpret_cast<uint32_t*>(
        check.pointer_or_null<int32_t>(signs, "signs", {words(batch), rows}));
    if (args.signs && !transposed.has_dendrite)
      throw py::value_error("Expected synapses packed with somas, got some without");
    if (args.signs && transposed.staged != plan.tile.staged)
      throw py::value_error("Expected sign bits staged as the synapses are packed, got others");
    args.dx = check.pointer<T>(dx, "grad of x", {batch, transposed.rows});
    args.batch = batch;
    args.inputs = int32_t(inputs);
    args.tile_rows = tile_rows;
    args.rows = rows;
    args.parts = plan.parts;
    args.slope = A(slope);
    check_grid(plan, tile_count * plan.parts, transposed);
    const DeviceGuard guard(check.device());
    require(
        Launcher<T>::input(with_width(plan, transposed), args, reinterpret_cast<Stream>(stream)));
  });
}

// Samples [B, columns] as tiles: in their own type (x), or for `gradient` in the accumulator's and,
// given y, times the activation's derivative.
void make_tiles(py::handle in, py::handle y, double slope, int32_t tile_rows, py::handle out,
                const Plan& plan, bool gradient, uintptr_t stream) {
  dispatch(in, "in", [&](auto zero, int64_t batch, int64_t columns) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    Checker check;
    const int64_t tile_count = tiles_of(plan, batch);
    const auto run = [&](auto out_zero, auto launcher) {
      using O = decltype(out_zero);
      TileArgs<T, O> args{};
      args.in = check.pointer<T>(in, "in", {batch, columns});
      args.y = check.pointer_or_null<T>(y, "y", {batch, columns});
      args.out = check.pointer<O>(out, "tiles", {tile_count, tile_rows, samples_of(plan)}, 16);
      args.batch = batch;
      args.columns = int32_t(columns);
      args.tile_rows = tile_rows;
      args.lane_bits = bits_of(32 / plan.tile.groups);
      args.sample_bits = bits_of(samples_of(plan));
      args.slope = A(slope);
      const DeviceGuard guard(check.device());
      require(launcher(args, tile_count, reinterpret_cast<Stream>(stream)));
    };
    if (gradient)
      run(A(), Launcher<T>::grad_tiles);
    else
      run(T(), Launcher<T>::x_tiles);
  });
}

void pack_weight(const Packed& packed, py::handle weight, py::handle cable, int64_t synapses,
                 int64_t rows, py::handle out, uintptr_t stream) {
  const auto run = [&](auto zero, auto launcher) {
    using A = decltype(zero);
    Checker check = packed.check;
    if (!packed.source) throw py::value_error("Expected synapses in another order, got CSR");
    PackArgs<A> args{};
    args.weight = check.pointer<A>(weight, "synapse_weight", {synapses});
    args.cable = check.pointer_or_null<A>(cable, "cable_weight", {rows});
    if (args.cable && !packed.has_dendrite)
      throw py::value_error("Expected a transposed packing, got none");
    args.source = packed.source;
    args.dendrite = packed.synapses.dendrite;
    args.staged = packed.staged;
    args.slots = packed.synapses.slots;
    args.packed = check.pointer<A>(out, "packed weight", {args.slots});
    const DeviceGuard guard(check.device());
    require(launcher(args, reinterpret_cast<Stream>(stream)));
  };
  if (is_type<double>(borrow(weight, "synapse_weight")))
    run(double(), Launcher<double>::pack);
  else
    run(float(), Launcher<float>::pack);
}

}  // namespace
}  // namespace dk

PYBIND11_MODULE(DK_MODULE, m) {  // not mod_gil_not_used(), as in csrc/cpu/bind.cpp
  using namespace dk;
  m.def("configure", &configure, "Hands over torch's DLPack exchange table.");
#ifdef DK_EMULATE
  m.def("set_order", &emulator::set_order, "0: threads in order, 1: reversed, else shuffled.");
#else
  m.attr("archs") = DK_CUDA_ARCHS;
  m.def("limits", &limits, "Multiprocessors, shared memory of a block, of a multiprocessor, L2.");
  m.def("runtime_version", [] { return version(cudaRuntimeGetVersion); });
  m.def("driver_version", [] { return version(cudaDriverGetVersion); });
#endif
  py::class_<Plan>(m, "Plan").def(py::init(&make_plan));
  py::class_<Packed>(m, "Packed")
      .def(py::init<int32_t, py::object, py::object, py::object, py::object, py::object, py::object,
                    py::object, int32_t, int32_t, int32_t>());
  py::class_<Adam>(m, "Adam").def(py::init(
      [](double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled) {
        return Adam{lr, beta1, beta2, eps, weight_decay, decoupled};
      }));
  m.def("forward", &forward);
  m.def("backward_weight", &backward_weight);
  m.def("finish_weight", &finish_weight);
  m.def("backward_input", &backward_input);
  m.def("make_tiles", &make_tiles);
  m.def("pack_weight", &pack_weight);
}
