// The Python module adatape_kernels._C. Importing it registers the implementations of the ops in
// csrc/cpu and, where they were built, in csrc/cuda; the ops' schemas are written in Python only.
// The module's one function tells how it was built, and what the processor at hand can do.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/cpu_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

#if defined(__x86_64__)
// Asks the processor itself, because not every compiler's __builtin_cpu_supports knows AMX.
bool cpu_has_amx() {
  constexpr unsigned kExtendedFeatures = 7, kAmxBf16 = 1u << 22;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(kExtendedFeatures, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16);
}
#endif

// Names the instruction sets that this processor has, not those that the compiler was told to use.
std::string instruction_sets() {
  std::string found;
#if defined(__x86_64__)
  const auto add = [&found](bool has, const char* name) {
    if (has) found += (found.empty() ? "" : " ") + std::string(name);
  };
  add(__builtin_cpu_supports("sse4.2"), "sse4.2");
  add(__builtin_cpu_supports("avx2"), "avx2");
  add(__builtin_cpu_supports("fma"), "fma");
  add(__builtin_cpu_supports("avx512f"), "avx512f");
  add(__builtin_cpu_supports("avx512bw"), "avx512bw");
  add(__builtin_cpu_supports("avx512bf16"), "avx512_bf16");
  add(cpu_has_amx(), "amx");
#endif
  return found.empty() ? "portable" : found;
}

py::dict build_facts() {
  py::dict facts;
  facts["version"] = ADATAPE_VERSION;
  facts["torch"] = ADATAPE_TORCH_VERSION;
  facts["compiler"] = ADATAPE_COMPILER;
  facts["standard"] = ADATAPE_STANDARD;
  facts["build_type"] = ADATAPE_BUILD_TYPE;
  // This names the toolkit that compiled csrc/cuda, or is "none: " and the reason.
  facts["cuda"] = ADATAPE_CUDA;
  facts["instruction_sets"] = instruction_sets();
  try {
    facts["cpu_kernels"] = adatape::cpu_kernels().name;
  } catch (const std::runtime_error& error) {
    facts["cpu_kernels"] = error.what();
  }
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of adatape_kernels.";
  m.def("build_facts", &build_facts, "How this module was built, and what this processor can do.");
}
