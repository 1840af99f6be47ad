// Chooses the kernels for the processor at hand; cpu_kernels.h says what they do.

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(ADATAPE_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu_kernels.h"

// Declares the kernels that one instruction set's namespace defines, and makes their table.
#define ADATAPE_DECLARE(isa)                                                                       \
  namespace isa {                                                                                  \
  void attention_fwd(const CpuElasticAttentionParams&, const AttentionTask&,                       \
                     const AttentionTask*);                                                        \
  void attention_bwd(const CpuElasticAttentionParams&, const AttentionTask&,                       \
                     const AttentionTask*);                                                        \
  void select_pack(const CpuTapeSelectParams&, float*, int64_t, int64_t);                          \
  void select_pack_coarse(const CpuTapeSelectParams&, int64_t, const CpuCoarseKeys&, int64_t,      \
                          int64_t);                                                                \
  bool select_start(const CpuTapeSelectParams&, const CpuTapeSelectState&, int64_t);               \
  void select_scan(const CpuTapeSelectParams&, const CpuTapeSelectState&, const int64_t*, int64_t, \
                   int64_t);                                                                       \
  bool select_read(const CpuTapeSelectParams&, const CpuTapeSelectState&, int64_t);                \
  void select_fwd(const CpuTapeSelectParams&, const CpuTapeSelectState&, int64_t, int64_t);        \
  void select_bwd(const CpuTapeSelectParams&, int64_t);                                            \
  void gather_fwd(const CpuTapeGatherParams&, int64_t, int64_t, int64_t);                          \
  void gather_bwd(const CpuTapeGatherParams&, int64_t);                                            \
  void segment_sum(const CpuSegmentSumParams&, const Contribution*, const Contribution*);          \
  void linear(const CpuLinearParams&, int64_t, int64_t);                                           \
  void bias(const CpuBiasActParams&, int64_t, int64_t);                                            \
  void bias_act(const CpuBiasActParams&, int64_t, int64_t);                                        \
  void act_bwd(const CpuBiasActParams&, int64_t, int64_t);                                         \
  void add_layer_norm_fwd(const CpuAddLayerNormParams&, int64_t, int64_t);                         \
  void add_layer_norm_bwd(const CpuAddLayerNormBwdParams&, int64_t, int64_t);                      \
  void accumulate_rows_fwd(const CpuAccumulateRowsParams&, int64_t, int64_t);                      \
  void accumulate_rows_bwd(const CpuAccumulateRowsBwdParams&, int64_t, int64_t);                   \
  }                                                                                                \
  constexpr CpuKernels k_##isa = {.name = #isa,                                                    \
                                  .attention_fwd = isa::attention_fwd,                             \
                                  .attention_bwd = isa::attention_bwd,                             \
                                  .select_pack = isa::select_pack,                                 \
                                  .multiplies_bytes = false,                                       \
                                  .select_pack_coarse = isa::select_pack_coarse,                   \
                                  .select_start = isa::select_start,                               \
                                  .select_scan = isa::select_scan,                                 \
                                  .select_read = isa::select_read,                                 \
                                  .select_fwd = isa::select_fwd,                                   \
                                  .select_bwd = isa::select_bwd,                                   \
                                  .gather_fwd = isa::gather_fwd,                                   \
                                  .gather_bwd = isa::gather_bwd,                                   \
                                  .segment_sum = isa::segment_sum,                                 \
                                  .linear = isa::linear,                                           \
                                  .bias = isa::bias,                                               \
                                  .bias_act = isa::bias_act,                                       \
                                  .act_bwd = isa::act_bwd,                                         \
                                  .add_layer_norm_fwd = isa::add_layer_norm_fwd,                   \
                                  .add_layer_norm_bwd = isa::add_layer_norm_bwd,                   \
                                  .accumulate_rows_fwd = isa::accumulate_rows_fwd,                 \
                                  .accumulate_rows_bwd = isa::accumulate_rows_bwd};

namespace adatape {

ADATAPE_DECLARE(portable)
#if defined(__x86_64__)
ADATAPE_DECLARE(avx2)
ADATAPE_DECLARE(avx512)

// Those of AVX-512, but for the products of bfloat16 and of bytes, which AVX512-BF16 and
// AVX512-VNNI have instructions for. Every processor that has the first has the second.
namespace avx512_bf16 {
void select_pack(const CpuTapeSelectParams&, float*, int64_t, int64_t);
void select_pack_coarse(const CpuTapeSelectParams&, int64_t, const CpuCoarseKeys&, int64_t,
                        int64_t);
bool select_start(const CpuTapeSelectParams&, const CpuTapeSelectState&, int64_t);
void select_scan(const CpuTapeSelectParams&, const CpuTapeSelectState&, const int64_t*, int64_t,
                 int64_t);
bool select_read(const CpuTapeSelectParams&, const CpuTapeSelectState&, int64_t);
void select_fwd(const CpuTapeSelectParams&, const CpuTapeSelectState&, int64_t, int64_t);
}  // namespace avx512_bf16
constexpr CpuKernels k_avx512_bf16 = [] {
  CpuKernels kernels = k_avx512;
  kernels.name = "avx512_bf16";
  kernels.attention_fwd = avx512_bf16::attention_fwd;
  kernels.attention_bwd = avx512_bf16::attention_bwd;
  kernels.multiplies_bytes = true;
  kernels.select_pack = avx512_bf16::select_pack;
  kernels.select_pack_coarse = avx512_bf16::select_pack_coarse;
  kernels.select_start = avx512_bf16::select_start;
  kernels.select_scan = avx512_bf16::select_scan;
  kernels.select_read = avx512_bf16::select_read;
  kernels.select_fwd = avx512_bf16::select_fwd;
  return kernels;
}();

#if defined(ADATAPE_HAS_AMX)
// The same, but for products in tiles.
namespace amx {
void attention_fwd(const CpuElasticAttentionParams&, const AttentionTask&, const AttentionTask*);
void attention_bwd(const CpuElasticAttentionParams&, const AttentionTask&, const AttentionTask*);
}  // namespace amx
constexpr CpuKernels k_amx = [] {
  CpuKernels kernels = k_avx512_bf16;
  kernels.name = "amx";
  kernels.attention_fwd = amx::attention_fwd;
  kernels.attention_bwd = amx::attention_bwd;
  return kernels;
}();
#endif
#endif

namespace {

#if defined(__x86_64__)
// Some compilers' __builtin_cpu_supports does not know the name.
bool converts_float16() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

#if defined(ADATAPE_HAS_AMX)
// Asks the processor itself, because not every compiler's __builtin_cpu_supports knows AMX.
bool has_tiles() {
  constexpr unsigned kExtendedFeatures = 7, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(kExtendedFeatures, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16) &&
         (edx & kAmxTile);
}

// Asks Linux to keep this process's tiles when it switches threads, which it does not do unasked.
// What it grants holds for all threads, and for good.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and its state
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const CpuKernels& choose() {
  const char* const wanted = std::getenv("ADATAPE_CPU");
  std::string available;
#if defined(__x86_64__)
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_float16();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#if defined(ADATAPE_HAS_AMX)
  if (bf16 && has_tiles()) {
    const bool asked_for = !wanted || wanted == std::string(k_amx.name);
    if (asked_for && may_use_tiles()) return k_amx;
    available = asked_for ? "" : "amx, ";
  }
#endif
  if (bf16 && (!wanted || wanted == std::string(k_avx512_bf16.name))) return k_avx512_bf16;
  if (avx512 && (!wanted || wanted == std::string(k_avx512.name))) return k_avx512;
  if (avx2 && (!wanted || wanted == std::string(k_avx2.name))) return k_avx2;
  available += std::string(bf16 ? "avx512_bf16, " : "") + (avx512 ? "avx512, " : "") +
               (avx2 ? "avx2 or " : "");
#endif
  if (!wanted || wanted == std::string(k_portable.name)) return k_portable;
  throw std::runtime_error("ADATAPE_CPU: expected " + available + "portable, got '" + wanted + "'");
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace adatape
