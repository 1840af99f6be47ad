// Chooses the kernels for AMX on a processor without it, where emulated_tiles.cpp runs them.

#define cpu_kernels kernels_of_this_processor
#include "../../csrc/cpu/choose_kernels.cpp"
#undef cpu_kernels

namespace adatape {

// Tiles alone are emulated, so that a processor needs all else that the kernels for them use. One
// that has tiles runs them itself.
const CpuKernels& cpu_kernels() {
  const CpuKernels& own = kernels_of_this_processor();
  return own.name == std::string(k_avx512_bf16.name) ? k_amx : own;
}

}  // namespace adatape
