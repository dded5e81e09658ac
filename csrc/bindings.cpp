// The module univigu_kernels._C: what it was built for and which instruction set it runs with.
// Importing it registers the operators of bindings_*.cpp with torch, in library univigu_C.
// No torch header here: pybind11's are torch's own, and those of 2.11 refuse its stable ABI.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

namespace univigu {
namespace {

constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512bf16"};

cpu::Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return cpu::Isa::portable;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!wide) return cpu::Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? cpu::Isa::avx512bf16 : cpu::Isa::avx512;
#else
  return cpu::Isa::portable;
#endif
}

std::atomic<cpu::Isa> current{best()};

std::vector<std::string> instruction_sets() {
  return {NAMES, NAMES + static_cast<int>(best()) + 1};
}

void set_instruction_set(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(best()); i++) {
    if (name == NAMES[i]) {
      current = static_cast<cpu::Isa>(i);
      return;
    }
  }
  throw std::invalid_argument("_C: instruction set must be one of this machine's; got " + name +
                              ". See univigu env.");
}

py::dict build_info() {
  py::dict info;
  info["torch"] = UNIVIGU_TORCH;
  info["torch_at_least"] = "2.11";
  info["compiler"] = __VERSION__;
  info["cuda_architectures"] = UNIVIGU_CUDA;
  info["instruction_sets"] = instruction_sets();
  info["instruction_set"] = NAMES[static_cast<int>(current.load())];
  return info;
}

}  // namespace

cpu::Isa isa() { return current; }

}  // namespace univigu

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of univigu_kernels; their operators are torch.ops.univigu_C.";
  m.def("build_info", &univigu::build_info, "What this module was built for and runs with.");
  m.def("set_instruction_set", &univigu::set_instruction_set, py::arg("name"),
        "Chooses the CPU kernels' instruction set, one of build_info()['instruction_sets'].");
}
