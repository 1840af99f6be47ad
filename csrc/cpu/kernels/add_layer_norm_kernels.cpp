// Residual addition with the LayerNorm of the sum: the formulas stand in
// adatape_kernels/reference.py. A row's results depend on that row alone.

#include "../cpu_kernels.h"
#include "columns.h"
#include "scratch.h"

namespace adatape::ADATAPE_ISA {
namespace {

template <bool wide, class T, class Branch>
void forward(const CpuAddLayerNormParams& p, int64_t first, int64_t count) {
  const float dim = static_cast<float>(p.dim), per_feature = 1.0f / dim;
  for (int64_t r = first; r < first + count; ++r) {
    const T* const x = static_cast<const T*>(p.x) + r * p.stride_x;
    const Branch* const branch = static_cast<const Branch*>(p.branch) + r * p.stride_branch;
    T* const total = static_cast<T*>(p.total) + r * p.dim;
    T* const normed = static_cast<T*>(p.normed) + r * p.dim;

    // The sum is read again after it was stored, because its rounded value is what is normalised.
    Vec features = {}, squares = {};
    int64_t begin = 0;
    do {
      const int64_t end = end_of_piece<wide>(begin, p.dim);
      Vec sums[kChains] = {};
      for_columns_in_chains(begin, end, [&](int64_t c, int lanes, int chain) {
        write(total + c, read(x + c, lanes) + read(branch + c, lanes), lanes);
        sums[chain] += read(total + c, lanes);
      });
      add_piece<wide>(features, sums);
      begin = end;
    } while (wide && begin < p.dim);
    // To multiply by the reciprocal would round the means of all rows to the same side, which adds
    // up in the gradient of the weight.
    const float mean = sum(features) / dim;
    begin = 0;
    do {
      const int64_t end = end_of_piece<wide>(begin, p.dim);
      Vec sums[kChains] = {};
      for_columns_in_chains(begin, end, [&](int64_t c, int lanes, int chain) {
        const Vec centred = first_lanes(read(total + c, lanes) - mean, lanes);
        sums[chain] += centred * centred;
      });
      add_piece<wide>(squares, sums);
      begin = end;
    } while (wide && begin < p.dim);
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) * per_feature + p.eps);
    for_columns(p.dim, [&](int64_t c, int lanes) {
      const Vec y = (read(total + c, lanes) - mean) * rstd;
      write(normed + c, read(p.weight + c, lanes) * y + read(p.bias + c, lanes), lanes);
    });
    p.mean[r] = mean;
    p.rstd[r] = rstd;
  }
}

template <bool wide, class T>
void backward(const CpuAddLayerNormBwdParams& p, int64_t block, int64_t count) {
  const float per_feature = 1.0f / static_cast<float>(p.dim);
  Scratch scratch;
  float* const y = scratch.take(p.dim);
  float* const g = scratch.take(p.dim);
  float* const dweight = p.dweight_parts + block * p.dim;
  float* const dbias = p.dbias_parts + block * p.dim;
  for_columns(p.dim, [&](int64_t c, int lanes) {
    write(dweight + c, Vec{}, lanes);
    write(dbias + c, Vec{}, lanes);
  });
  for (int64_t r = block * kLayerNormRows; r < block * kLayerNormRows + count; ++r) {
    const T* const dtotal = static_cast<const T*>(p.dtotal) + r * p.stride_dtotal;
    const T* const dnormed = static_cast<const T*>(p.dnormed) + r * p.stride_dnormed;
    const T* const total = static_cast<const T*>(p.total) + r * p.dim;
    T* const dx = static_cast<T*>(p.dx) + r * p.dim;
    const float mean = p.mean[r], rstd = p.rstd[r];

    // Here y is the row before weight and bias, and g = weight · dnormed. Both are kept, because dx
    // needs the means of g and g · y over the row. A product that were formed once more could be
    // rounded differently, and rstd may be large.
    Vec row_g = {}, row_gy = {};
    int64_t begin = 0;
    do {
      const int64_t end = end_of_piece<wide>(begin, p.dim);
      Vec sums_g[kChains] = {}, sums_gy[kChains] = {};
      for_columns_in_chains(begin, end, [&](int64_t c, int lanes, int chain) {
        const Vec dn = read(dnormed + c, lanes);
        write(y + c, (read(total + c, lanes) - mean) * rstd, lanes);
        write(g + c, read(p.weight + c, lanes) * dn, lanes);
        const Vec y_c = read(y + c, lanes), g_c = read(g + c, lanes);
        sums_g[chain] += g_c;
        sums_gy[chain] += g_c * y_c;
        write(dweight + c, read(dweight + c, lanes) + dn * y_c, lanes);
        write(dbias + c, read(dbias + c, lanes) + dn, lanes);
      });
      add_piece<wide>(row_g, sums_g);
      add_piece<wide>(row_gy, sums_gy);
      begin = end;
    } while (wide && begin < p.dim);
    const float mean_g = sum(row_g) * per_feature, mean_gy = sum(row_gy) * per_feature;
    for_columns(p.dim, [&](int64_t c, int lanes) {
      const Vec centred = read(g + c, lanes) - mean_g - read(y + c, lanes) * mean_gy;
      write(dx + c, read(dtotal + c, lanes) + rstd * centred, lanes);
    });
  }
}

}  // namespace

void add_layer_norm_fwd(const CpuAddLayerNormParams& p, int64_t first, int64_t count) {
  with_number(p.dtype, [&](auto x) {
    with_number(p.branch_dtype, [&](auto branch) {
      with_wide(p.dim,
                [&](auto wide) { forward<wide, decltype(x), decltype(branch)>(p, first, count); });
    });
  });
}

void add_layer_norm_bwd(const CpuAddLayerNormBwdParams& p, int64_t block, int64_t count) {
  with_number(p.dtype, [&](auto number) {
    with_wide(p.dim, [&](auto wide) { backward<wide, decltype(number)>(p, block, count); });
  });
}

}  // namespace adatape::ADATAPE_ISA
