// Python module _cpu: checks every argument, chooses the ISA, and runs the kernels on torch's
// thread pool without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "fast_path.h"
#include "isa.h"
#include "kernels.h"
#include "tensor.h"
#include "workspace.h"

namespace py = pybind11;

namespace dk {
namespace {

// ---- ISA ----

// The best supported table, or the one named in DENDRITE_KERNELS_ISA (empty means unset).
const KernelTable* pick_table() {
  const std::vector<const KernelTable*> tables = supported_tables();
  const char* wanted = std::getenv("DENDRITE_KERNELS_ISA");
  if (!wanted || !*wanted) return tables.back();
  std::string names;
  for (const KernelTable* table : tables) {
    if (std::string(table->isa) == wanted) return table;
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw py::import_error("DENDRITE_KERNELS_ISA: Expected one of " + names +
                         " on this machine, got " + wanted);
}

const KernelTable* table = nullptr;

// ---- threads ----

using PoolBody = void (*)(int64_t, int64_t, void*);
int32_t (*pool_for)(int64_t begin, int64_t end, int64_t grain, PoolBody body,
                    void* context) = nullptr;

void run_on_pool(int64_t n, PoolBody body, void* context) {
  if (pool_for(0, n, 1, body, context)) throw std::runtime_error("torch_parallel_for failed");
}

int64_t l2_bytes() {
  constexpr int64_t kCommon = 1 << 20;
#ifdef _SC_LEVEL2_CACHE_SIZE
  const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return kCommon;
}

Runtime runtime(int threads, Workspace& workspace) {
  static const int64_t l2 = l2_bytes();
  return {threads, l2, run_on_pool, Workspace::get, &workspace};
}

void configure(const py::capsule& exchange_api, uintptr_t parallel_for, uintptr_t num_threads,
               uintptr_t forked, const py::module_& module, py::object empty_strided) {
  const auto* api = static_cast<const DLExchangeAbi*>(
      PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  while (api && api->major > 1) api = api->previous;
  if (!api || api->major != 1 || !api->borrow)
    throw py::import_error(
        "Expected torch to offer version 1 of the DLPack exchange table, got none");
  exchange = api;
  pool_for = reinterpret_cast<decltype(pool_for)>(parallel_for);
  const auto kept = [](py::object object) { return object.release().ptr(); };  // never freed
  const auto kind = [&](py::object type) { return reinterpret_cast<PyTypeObject*>(kept(type)); };
  torch = {kind(module.attr("Tensor")),
           kind(module.attr("nn").attr("Parameter")),
           kept(module.attr("Tensor").attr("is_neg")),
           kept(py::str("requires_grad")),
           kept(empty_strided),
           kept(module.attr("int32")),
           kept(module.attr("float32")),
           kept(module.attr("float64")),
           reinterpret_cast<decltype(torch.num_threads)>(num_threads),
           reinterpret_cast<const bool*>(forked)};
}

// ---- connectivity ----

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// True for uint16 indices, false for int32.
bool is_narrow(const py::array& indices, const char* name) {
  if (py::isinstance<Array<uint16_t>>(indices)) return true;
  if (py::isinstance<Array<int32_t>>(indices)) return false;
  throw py::type_error(std::string(name) + ": Expected contiguous uint16 or int32, got " +
                       std::string(py::str(indices.dtype())));
}

// Pointers into the arrays of a Connectivity (validated, immutable), which it keeps alive.
class BoundTopology {
 public:
  BoundTopology(int64_t in_features, const Array<int32_t>& crow, const py::array& columns,
                const Array<int32_t>& soma_ptr, int64_t fan_in) {
    net.in_features = in_features;
    net.rows = crow.size() - 1;
    net.somas = soma_ptr.size() - 1;
    net.nnz = columns.size();
    net.fan_in = fan_in;
    net.crow = keep(crow);
    net.soma_ptr = keep(soma_ptr);
    net.narrow = is_narrow(columns, "columns");
    net.columns = keep_any(columns);
    row_strides = pair(net.rows, 1);
    soma_strides = pair(net.somas, 1);
  }
  void set_transposed(int64_t block_rows, int64_t group, const Array<int64_t>& column_ptr,
                      const py::array& column, const Array<uint16_t>& groups,
                      const Array<int64_t>& slot_ptr, const Array<uint16_t>& row,
                      const py::array& slot, const py::array& synapse) {
    if (is_narrow(column, "column") != net.narrow)
      throw py::type_error(
          "Expected plan columns as wide as the connectivity's, got another width");
    net.plan_narrow = is_narrow(slot, "slot");
    if (is_narrow(synapse, "synapse") != net.plan_narrow)
      throw py::type_error("Expected slots as wide as synapses, got another width");
    net.plan_column_ptr = keep(column_ptr);
    net.plan_slot_ptr = keep(slot_ptr);
    net.plan_column = keep_any(column);
    net.plan_groups = keep(groups);
    net.plan_row = keep(row);
    net.plan_slot = keep_any(slot);
    net.plan_synapse = keep_any(synapse);
    net.block_rows = block_rows;
    net.group = group;
    net.blocks = column_ptr.size() - 1;
  }
  // soma is None for an order within groups of rows.
  void set_order(const Array<int32_t>& order, const py::object& soma, const Array<int32_t>& crow,
                 const py::array& columns, int64_t group_size) {
    if (is_narrow(columns, "columns") != net.narrow)
      throw py::type_error("Expected columns as wide as the connectivity's, got another width");
    net.order = keep(order);
    if (!soma.is_none()) net.soma = keep(soma.cast<Array<int32_t>>());
    net.ordered_crow = keep(crow);
    net.ordered_columns = keep_any(columns);
    net.group_size = group_size;
  }
  Topology net{};
  py::object row_strides, soma_strides;  // of tensors [B, R] and [B, S]

 private:
  const void* keep_any(const py::array& array) {
    arrays_.push_back(array);
    return array.data();
  }
  template <class T>
  const T* keep(const Array<T>& array) {
    return static_cast<const T*>(keep_any(array));
  }
  std::vector<py::array> arrays_;
};

// ---- calls ----

// How x, y and their gradients are stored. All other tensors have the type of the sums.
struct Samples {
  int64_t batch;
  Storage storage;
  Type type;
};

// An order for somas has one entry per dendrite in `soma`; an order for rows has none.
void check_order(const Topology& net, bool somas) {
  if (net.order && somas != bool(net.soma))
    throw py::value_error(somas ? "Expected an order of dendrites with their somas, got one of rows"
                                : "Expected an order of rows, got one of dendrites with somas");
}

template <class T>
void forward(const BoundTopology& bound, py::handle x, py::handle weight, py::handle dendrite_bias,
             py::handle cable, py::handle soma_bias, double slope, double soma_slope, bool round_x,
             py::handle y, py::handle signs, const Samples& samples, int threads,
             void (*kernel)(const Topology&, const ForwardCall<T>&, const Runtime&)) {
  const Topology& net = bound.net;
  ForwardCall<T> call{};
  const int64_t batch = call.batch = samples.batch;
  call.storage = samples.storage;
  call.round_x = round_x;
  call.x = checked(x, "x", samples.type, {batch, net.in_features});
  call.weight = pointer<T>(weight, "synapse_weight", {net.nnz});
  call.dendrite_bias = pointer_or_null<T>(dendrite_bias, "dendrite_bias", {net.rows});
  call.cable = pointer_or_null<T>(cable, "cable_weight", {net.rows});
  call.soma_bias = pointer_or_null<T>(soma_bias, "soma_bias", {net.somas});
  call.slope = T(slope);
  call.soma_slope = T(soma_slope);
  call.y = checked(y, "y", samples.type, {batch, call.cable ? net.somas : net.rows});
  check_order(net, call.cable);
  if (!signs.is_none())
    call.signs =
        static_cast<uint32_t*>(checked(signs, "signs", kInt32, {(batch + 31) / 32, net.rows}));
  if (batch == 0) return;
  py::gil_scoped_release release;
  Workspace workspace;
  kernel(net, call, runtime(threads, workspace));
}

template <class T>
void backward(const BoundTopology& bound, py::handle grad, py::handle x, py::handle y,
              py::handle signs, py::handle weight, py::handle dendrite_bias, py::handle cable,
              double slope, double soma_slope, py::handle dx, py::handle dweight,
              py::handle ddendrite_bias, py::handle dcable, py::handle dsoma_bias,
              const Samples& samples, int threads,
              void (*kernel)(const Topology&, const BackwardCall<T>&, const Runtime&)) {
  const Topology& net = bound.net;
  const bool somas = !cable.is_none();
  const int64_t outputs = somas ? net.somas : net.rows;
  BackwardCall<T> call{};
  const int64_t batch = call.batch = samples.batch;
  call.storage = samples.storage;
  call.grad = checked(grad, "grad", samples.type, {batch, outputs});
  call.x = checked(x, "x", samples.type, {batch, net.in_features});
  call.weight = pointer<T>(weight, "synapse_weight", {net.nnz});
  call.dendrite_bias = pointer_or_null<T>(dendrite_bias, "dendrite_bias", {net.rows});
  call.slope = T(slope);
  call.soma_slope = T(soma_slope);
  if (!dx.is_none()) call.dx = checked(dx, "grad of x", samples.type, {batch, net.in_features});
  call.dweight = pointer<T>(dweight, "grad of synapse_weight", {net.nnz});
  call.ddendrite_bias = pointer<T>(ddendrite_bias, "grad of dendrite_bias", {net.rows});
  if (somas) {
    call.y = checked(y, "y", samples.type, {batch, outputs});
    call.signs =
        static_cast<uint32_t*>(checked(signs, "signs", kInt32, {(batch + 31) / 32, net.rows}));
    call.cable = pointer<T>(cable, "cable_weight", {net.rows});
    call.dcable = pointer<T>(dcable, "grad of cable_weight", {net.rows});
    call.dsoma_bias = pointer<T>(dsoma_bias, "grad of soma_bias", {net.somas});
  }
  check_order(net, somas);
  if (call.dx && !net.plan_column_ptr)
    throw py::value_error("Expected a transposed plan for the gradient of x, got none");
  if (batch == 0) throw py::value_error("Expected a batch of at least one sample, got 0");
  py::gil_scoped_release release;
  Workspace workspace;
  kernel(net, call, runtime(threads, workspace));
}

// Runs f(T(), samples) for the dtype and batch of x; T is the type of the sums.
template <class F>
void dispatch(py::handle x, const F& f) {
  const DLTensorAbi t = borrow(x, "x");
  if (t.ndim != 2) throw py::value_error("x: Expected 2 dimensions, got " + std::to_string(t.ndim));
  if (has_type(t, kFloat32))
    f(float(), Samples{t.shape[0], Storage::full, kFloat32});
  else if (has_type(t, kFloat64))
    f(double(), Samples{t.shape[0], Storage::full, kFloat64});
  else if (has_type(t, kBfloat16))
    f(float(), Samples{t.shape[0], Storage::bf16, kBfloat16});
  else if (has_type(t, kFloat16))
    f(float(), Samples{t.shape[0], Storage::f16, kFloat16});
  else
    throw py::type_error(
        "x: Expected dtype float32, float64, bfloat16 or float16, got another dtype");
}

void any_forward(const BoundTopology& bound, py::handle x, py::handle weight,
                 py::handle dendrite_bias, py::handle cable, py::handle soma_bias, double slope,
                 double soma_slope, bool round_x, py::handle y, py::handle signs, int threads) {
  dispatch(x, [&](auto zero, const Samples& samples) {
    using T = decltype(zero);
    const auto kernel = [] {
      if constexpr (sizeof(T) == 4)
        return table->forward_f32;
      else
        return table->forward_f64;
    }();
    forward<T>(bound, x, weight, dendrite_bias, cable, soma_bias, slope, soma_slope, round_x, y,
               signs, samples, threads, kernel);
  });
}

void any_backward(const BoundTopology& bound, py::handle grad, py::handle x, py::handle y,
                  py::handle signs, py::handle weight, py::handle dendrite_bias, py::handle cable,
                  double slope, double soma_slope, py::handle dx, py::handle dweight,
                  py::handle ddendrite_bias, py::handle dcable, py::handle dsoma_bias,
                  int threads) {
  dispatch(x, [&](auto zero, const Samples& samples) {
    using T = decltype(zero);
    const auto kernel = [] {
      if constexpr (sizeof(T) == 4)
        return table->backward_f32;
      else
        return table->backward_f64;
    }();
    backward<T>(bound, grad, x, y, signs, weight, dendrite_bias, cable, slope, soma_slope, dx,
                dweight, ddendrite_bias, dcable, dsoma_bias, samples, threads, kernel);
  });
}

// ---- the fast path ----

// None if `fast_forward` does not accept these operands, else whether one of them requires a
// gradient. cable is None for a sparse linear layer.
py::object accepts(const BoundTopology& bound, py::handle x, py::handle weight,
                   py::handle dendrite_bias, py::handle cable, py::handle soma_bias) {
  const Topology& net = bound.net;
  DLTensorAbi t;
  if (!borrowed(x, &t) || t.ndim != 2) return py::none();
  const Type type = has_type(t, kFloat64) ? kFloat64 : kFloat32;
  if (!fits(t, type, {t.shape[0], net.in_features})) return py::none();
  bool required = requires_grad(x);
  const auto parameter = [&](py::handle p, int64_t length, bool optional) {
    if (p.is_none()) return optional;
    if (!borrowed(p, &t) || !fits(t, type, {length})) return false;
    required = required || requires_grad(p);
    return true;
  };
  const bool accepted = parameter(weight, net.nnz, false) &&
                        parameter(dendrite_bias, net.rows, true) &&
                        parameter(cable, net.rows, true) && parameter(soma_bias, net.somas, true);
  return accepted ? py::object(py::bool_(required)) : py::none();
}

// y, or (y, signs), of operands that `accepts` accepted. any_forward checks them again.
py::object fast_forward(const BoundTopology& bound, py::handle x, py::handle weight,
                        py::handle dendrite_bias, py::handle cable, py::handle soma_bias,
                        double slope, double soma_slope, bool save_signs) {
  const DLTensorAbi t = borrow(x, "x");
  if (t.ndim != 2) throw py::value_error("x: Expected 2 dimensions, got " + std::to_string(t.ndim));
  const bool somas = !cable.is_none();
  const int64_t batch = t.shape[0], rows = bound.net.rows;
  const py::object y = new_tensor(batch, somas ? bound.net.somas : rows,
                                  somas ? bound.soma_strides : bound.row_strides,
                                  has_type(t, kFloat64) ? torch.float64 : torch.float32);
  const py::object signs =
      save_signs ? new_tensor((batch + 31) / 32, rows, bound.row_strides, torch.int32) : py::none();
  any_forward(bound, x, weight, dendrite_bias, cable, soma_bias, slope, soma_slope, false, y, signs,
              threads());
  if (!save_signs) return y;
  return py::reinterpret_steal<py::object>(PyTuple_Pack(2, y.ptr(), signs.ptr()));
}

}  // namespace
}  // namespace dk

// Not py::mod_gil_not_used(): no free-threaded Python has run the tests, so one takes its GIL back.
PYBIND11_MODULE(_cpu, m) {
  using namespace dk;
  table = pick_table();
  m.def("configure", &configure,
        "Takes torch's DLPack exchange table; the addresses of torch_parallel_for, "
        "torch_get_num_threads and a bool that is true in forked processes; torch; an allocator.");
  m.def("isa", [] { return table->isa; });
  m.def("supported_isas", [] {
    std::vector<const char*> names;
    for (const KernelTable* t : supported_tables()) names.push_back(t->isa);
    py::list list;
    for (const char* name : names) list.append(name);
    return list;
  });
  m.def("threads", &threads);
  py::class_<BoundTopology>(m, "Topology")
      .def(py::init<int64_t, const Array<int32_t>&, const py::array&, const Array<int32_t>&,
                    int64_t>())
      .def("set_transposed", &BoundTopology::set_transposed)
      .def("set_order", &BoundTopology::set_order)
      .def("accepts", &accepts)
      .def("forward", &fast_forward);
  m.def(
      "poison_workspaces", [](bool on) { poison_workspaces = on; },
      "For tests: fill every workspace with NaN.");
  m.def("forward", &any_forward);
  m.def("backward", &any_backward);
}
