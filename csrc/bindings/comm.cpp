// What Python sees of the communicator: objects with state, so pybind11 binds them (operators: ops.cpp).
#include <torch/csrc/utils/pybind.h>

#include "process_group.h"

namespace deepfast::bindings {

namespace {

namespace py = pybind11;
using Released = py::call_guard<py::gil_scoped_release>;

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const Missing& missing) {
    const py::object type = py::module_::import("deepfast.errors").attr("PeerTimeout");
    PyErr_SetObject(type.ptr(), type(missing.what(), py::tuple(py::cast(missing.ranks))).ptr());
  }
}

// So that Ctrl-C ends a wait.
void look_for_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::shared_ptr<Peers> make_peers(int rank, std::vector<int> fds, std::vector<int> names, int64_t heap,
                                  double timeout) {
  return std::make_shared<Peers>(
      rank, std::move(fds), std::move(names), heap,
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(timeout)));
}

}  // namespace

PYBIND11_MODULE(deepfast_comm, m) {
  py::module_::import("torch.distributed");
  py::register_exception_translator(&translate);
  m.attr("MAX_RANKS") = kMaxRanks;
  m.attr("HEAP_AT") = Peers::kHeapAt;
  py::class_<Hosts, std::shared_ptr<Hosts>>(m, "Hosts")
      .def(
          py::init<c10::intrusive_ptr<Backend>, c10::intrusive_ptr<c10d::Store>, int, std::vector<std::vector<int>>>());
  py::class_<Peers, std::shared_ptr<Peers>>(m, "Peers")
      .def(py::init(&make_peers))
      .def("gone", &Peers::gone, Released())
      .def("report", &Peers::report)
      .def("heed_signals", [](Peers& peers) { peers.look_up = &look_for_signals; });
  py::class_<Communicator, std::shared_ptr<Communicator>>(m, "Communicator")
      .def(py::init<int, int, std::shared_ptr<Peers>, std::shared_ptr<Hosts>>())
      .def("all_reduce_", &Communicator::all_reduce, Released())
      .def("reduce_scatter", &Communicator::reduce_scatter, Released())
      .def("all_gather", &Communicator::all_gather, Released())
      .def("add_to_owners", &Communicator::add_to_owners, Released())
      .def("addresses", &Communicator::addresses, Released())
      .def("empty", &Communicator::empty, Released())
      .def("close", &Communicator::close, Released());
  py::class_<ProcessGroup, c10::intrusive_ptr<ProcessGroup>, Backend>(m, "ProcessGroup")
      .def(py::init<int, int, std::shared_ptr<Communicator>, c10::intrusive_ptr<Backend>,
                    c10::intrusive_ptr<Backend>>());
}

}  // namespace deepfast::bindings
