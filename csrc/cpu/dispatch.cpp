// Chooses the kernels for the processor at hand: see kernels.h.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#define ADATAPE_DECLARE(isa)                                                                  \
  namespace isa {                                                                             \
  void attention_fwd(const AttentionParams&, int64_t, int64_t, int64_t);                      \
  void attention_bwd(const AttentionParams&, int64_t, int64_t);                               \
  void select_columns(const SelectParams&, float*, int64_t, int64_t);                         \
  void select_fwd(const SelectParams&, int64_t, int64_t);                                     \
  void select_bwd(const SelectParams&, int64_t);                                              \
  void gather_fwd(const GatherParams&, int64_t);                                              \
  void gather_bwd(const GatherParams&, int64_t);                                              \
  void sum_readers(const Reader*, const Reader*, const void*, int64_t, DType, void*, int64_t, \
                   DType);                                                                    \
  void bias(const ActParams&, int64_t, int64_t);                                              \
  void bias_gelu(const ActParams&, int64_t, int64_t);                                         \
  void gelu_bwd(const ActParams&, int64_t, int64_t);                                          \
  void bias_glu(const ActParams&, int64_t, int64_t);                                          \
  void glu_bwd(const ActParams&, int64_t, int64_t);                                           \
  }                                                                                           \
  constexpr Kernels k_##isa = {#isa,                                                          \
                               isa::attention_fwd,                                            \
                               isa::attention_bwd,                                            \
                               isa::select_columns,                                           \
                               isa::select_fwd,                                               \
                               isa::select_bwd,                                               \
                               isa::gather_fwd,                                               \
                               isa::gather_bwd,                                               \
                               isa::sum_readers,                                              \
                               isa::bias,                                                     \
                               isa::bias_gelu,                                                \
                               isa::gelu_bwd,                                                 \
                               isa::bias_glu,                                                 \
                               isa::glu_bwd};

namespace adatape {

ADATAPE_DECLARE(portable)
#if defined(__x86_64__)
ADATAPE_DECLARE(avx2)
ADATAPE_DECLARE(avx512)
#endif

namespace {

const Kernels& choose() {
  const char* const wanted = std::getenv("ADATAPE_CPU");
  std::string available;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && (!wanted || wanted == std::string(k_avx512.name))) return k_avx512;
  if (avx2 && (!wanted || wanted == std::string(k_avx2.name))) return k_avx2;
  available = std::string(avx512 ? "avx512, " : "") + (avx2 ? "avx2 or " : "");
#endif
  if (!wanted || wanted == std::string(k_portable.name)) return k_portable;
  throw std::runtime_error("ADATAPE_CPU: expected " + available + "portable, got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace adatape
