// Where the rows of an example lie, and how those of a head become the operands of products.
//
// The rows of one head of an example, inputs first and then tape, are copied into dense matrices. A
// copy costs 1 / rows of what the products cost, and lets them run over dense matrices.

#pragma once

#include "../cpu_kernels.h"
#include "gemm.h"
#include "scratch.h"

namespace adatape::ADATAPE_ISA {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Where the rows of one example lie: its inputs, then its tape.
struct ExampleRows {
  int64_t first_input, inputs, first_tape, tapes;

  ExampleRows(const CpuElasticAttentionParams& p, int64_t i)
      : first_input(p.cu_inputs[i]),
        inputs(p.cu_inputs[i + 1] - p.cu_inputs[i]),
        first_tape(p.cu_tapes[i]),
        tapes(p.cu_tapes[i + 1] - p.cu_tapes[i]) {}

  int64_t rows() const { return inputs + tapes; }
  // Returns the row of the buffer that is row r of the example.
  int64_t at(int64_t r) const { return r < inputs ? first_input + r : first_tape + r - inputs; }
};

// So many rows of one head of an example, from `first` on.
template <class T>
struct HeadBlock {
  const CpuHeadRows& x;
  const ExampleRows& example;
  int64_t head, first, count, dim;

  __attribute__((always_inline)) T* row(int64_t r) const {
    const int64_t at = example.at(first + r);
    return static_cast<T*>(x.data) + at * x.stride_row + head * x.stride_head;
  }
};

// How the numbers of matrices of T are multiplied: as float, one an element, or as bfloat16, two.
template <class T>
struct AsFloat {
  using Number = T;
  using Element = float;
  static constexpr int64_t kNumbers = 1;
};
#if defined(__AVX512BF16__)
struct AsPairs {
  using Number = bfloat16;
  using Element = BFloat16Pair;
  static constexpr int64_t kNumbers = 2;
};
// An example of fewer rows is computed in float. What rounding the weights of attention costs is
// less than what plain torch's own roundings do, but only on average over some rows.
constexpr int64_t kLeastRowsAsPairs = 32;
inline bool as_pairs(const CpuElasticAttentionParams& p, const AttentionTask& task) {
  return p.dtype == DType::kBFloat16 && ExampleRows(p, task.example).rows() >= kLeastRowsAsPairs;
}
#endif

// Calls `run` with the form in which a task is computed.
template <class Run>
void in_form_of(const CpuElasticAttentionParams& p, const AttentionTask& task, const Run& run) {
#if defined(__AVX512BF16__)
  if (as_pairs(p, task)) return run(AsPairs{});
#endif
  static_cast<void>(task);
  with_number(p.dtype, [&](auto number) { run(AsFloat<decltype(number)>{}); });
}

// Elements that so many numbers make.
template <class Form>
int64_t elements(int64_t numbers) {
  return (numbers + Form::kNumbers - 1) / Form::kNumbers;
}
// The same, with those that fill up the last tile.
template <class Form>
int64_t whole_elements(int64_t numbers) {
  return whole_tiles<typename Form::Element>(elements<Form>(numbers));
}

// Copies rows to the rows of `to`, whose features follow each other along the depth: (count,
// stride), with zeros behind the features of a row. The stride is a multiple of kLanes.
template <class T>
void copy_rows(const HeadBlock<T>& from, int64_t stride, float* to) {
  for (int64_t r = 0; r < from.count; ++r, to += stride) {
    const T* const row = from.row(r);
    int64_t d = 0;
    for (; d + kLanes <= from.dim; d += kLanes) store(to + d, load(row + d));
    if (d < stride) store(to + d, load_some(row + d, from.dim - d));
  }
}

// Copies rows to the columns of `to`, which is (whole elements of the features, columns), with
// zeros behind the rows and the features. The number of columns is a multiple of kLanes.
template <class T>
void copy_to_columns(const HeadBlock<T>& from, int64_t columns, float* to) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t lanes = from.count - c < kLanes ? from.count - c : kLanes;
    const T* rows[kLanes];
    for (int64_t l = 0; l < lanes; ++l) rows[l] = from.row(c + l);
    int64_t d = 0;
    for (; lanes == kLanes && d + kLanes <= from.dim; d += kLanes) {
      IntVec square[kLanes];
      for (int l = 0; l < kLanes; ++l) square[l] = reinterpret_cast<IntVec>(load(rows[l] + d));
      transpose(square);
      float* const first = to + d * columns + c;
      for (int f = 0; f < kLanes; ++f) {
        store(first + f * columns, reinterpret_cast<Vec>(square[f]));
      }
    }
    for (; d < from.dim; d += kLanes) {
      const int64_t features = from.dim - d < kLanes ? from.dim - d : kLanes;
      IntVec square[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        Vec numbers = {};
        if (l < lanes)
          numbers = features == kLanes ? load(rows[l] + d) : load_some(rows[l] + d, features);
        square[l] = reinterpret_cast<IntVec>(numbers);
      }
      transpose(square);
      for (int64_t f = 0; f < features; ++f) {
        store(to + (d + f) * columns + c, reinterpret_cast<Vec>(square[f]));
      }
    }
  }
}

// Copies rows to the rows of `to`, which follow each other along the depth: (whole elements of the
// rows, width), with zeros behind the features and the rows.
template <class T>
void copy_along_depth(const HeadBlock<T>& from, int64_t width, float* to) {
  copy_rows(from, width, to);
}

#if defined(__AVX512BF16__)
// Loads up to a vector of numbers, or up to a vector of their pairs, with zeros behind them.
inline HalfVec load_numbers(const bfloat16* from, int64_t count) {
  HalfVec result = {};
  if (count < kLanes) {
    bfloat16 some[kLanes] = {};
    std::memcpy(some, from, static_cast<size_t>(count) * sizeof(bfloat16));
    std::memcpy(&result, some, sizeof result);
    return result;
  }
  std::memcpy(&result, from, sizeof result);
  return result;
}
inline IntVec load_pairs(const bfloat16* from, int64_t numbers) {
  IntVec result;
  if (numbers < 2 * kLanes) {
    bfloat16 some[2 * kLanes] = {};
    if (numbers > 0) std::memcpy(some, from, static_cast<size_t>(numbers) * sizeof(bfloat16));
    std::memcpy(&result, some, sizeof result);
    return result;
  }
  std::memcpy(&result, from, sizeof result);
  return result;
}
inline void store_pairs(BFloat16Pair* to, IntVec pairs) { std::memcpy(to, &pairs, sizeof pairs); }
inline void zero_pairs(BFloat16Pair* to, int64_t count) {
  std::memset(to, 0, static_cast<size_t>(count) * sizeof(BFloat16Pair));
}

// The pairs of the numbers of two rows.
inline IntVec paired(HalfVec first, HalfVec second) {
  return widened(first) | (widened(second) << 16);
}

inline void copy_rows(const HeadBlock<bfloat16>& from, int64_t stride, BFloat16Pair* to) {
  for (int64_t r = 0; r < from.count; ++r, to += stride) {
    const bfloat16* const row = from.row(r);
    for (int64_t d = 0; d < stride; d += kLanes) {
      store_pairs(to + d, load_pairs(row + 2 * d, from.dim - 2 * d));
    }
  }
}

inline void copy_to_columns(const HeadBlock<bfloat16>& from, int64_t columns, BFloat16Pair* to) {
  const int64_t pairs = whole_elements<AsPairs>(from.dim);
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t lanes = from.count - c < kLanes ? from.count - c : kLanes;
    for (int64_t d = 0; d < pairs; d += kLanes) {
      const int64_t some = pairs - d < kLanes ? pairs - d : kLanes;
      IntVec square[kLanes] = {};
      for (int64_t l = 0; l < lanes; ++l) {
        square[l] = load_pairs(from.row(c + l) + 2 * d, from.dim - 2 * d);
      }
      transpose(square);
      for (int64_t f = 0; f < some; ++f) store_pairs(to + (d + f) * columns + c, square[f]);
    }
  }
}

inline void copy_along_depth(const HeadBlock<bfloat16>& from, int64_t width, BFloat16Pair* to) {
  for (int64_t r = 0; r < from.count; r += 2, to += width) {
    const bfloat16* const first = from.row(r);
    const bfloat16* const second = r + 1 < from.count ? from.row(r + 1) : nullptr;
    for (int64_t d = 0; d < width; d += kLanes) {
      const HalfVec below = second ? load_numbers(second + d, from.dim - d) : HalfVec{};
      store_pairs(to + d, paired(load_numbers(first + d, from.dim - d), below));
    }
  }
  const int64_t pairs = elements<AsPairs>(from.count);
  zero_pairs(to, (whole_elements<AsPairs>(from.count) - pairs) * width);
}
#endif

// Sets to zero what lies behind the first `numbers` of each row of a left operand, up to the last
// tile's end. The rows are `stride` elements apart; as pairs, numbers fill half of them.
inline void close_rows(const float*, int64_t, int64_t, int64_t) {}
#if defined(__AVX512BF16__)
inline void close_rows(BFloat16Pair* rows, int64_t count, int64_t stride, int64_t numbers) {
  if constexpr (kWholeTile<BFloat16Pair> == 1) return;
  const int64_t behind = 2 * whole_elements<AsPairs>(numbers) - numbers;
  for (int64_t r = 0; r < count; ++r) {
    char* const end = reinterpret_cast<char*>(rows + r * stride) + 2 * numbers;
    std::memset(end, 0, static_cast<size_t>(behind) * sizeof(bfloat16));
  }
}
#endif

// A matrix as the left operand of a product.
template <class Element>
struct LeftOperand {
  const Element* at;
  int64_t stride_row, stride_col;
};

// Makes rows of the columns of a matrix, which is (depth, columns) with as many columns as lie
// between its rows, a multiple of kLanes. Where there are tiles it is copied to `room`, which is
// (columns, whole tiles of the depth), with zeros behind the depth.
template <class Element>
LeftOperand<Element> turned(const Element* from, int64_t depth, int64_t columns, Element* room) {
  if constexpr (kWholeTile<Element> == 1) return {from, 1, columns};
  const int64_t stride = whole_tiles<Element>(depth);
  for (int64_t c = 0; c < columns; c += kLanes) {
    for (int64_t k = 0; k < stride; k += kLanes) {
      IntVec square[kLanes] = {};
      const int64_t rows = depth - k < kLanes ? depth - k : kLanes;
      for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(&square[i], from + (k + i) * columns + c, sizeof(IntVec));
      }
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) {
        std::memcpy(room + (c + i) * stride + k, &square[i], sizeof(IntVec));
      }
    }
  }
  return {room, stride, 1};
}

// Copies rows of float, `width` apart, to the rows of a block, each times factor_of(row).
template <class T, class Factor>
void copy_out(const float* from, int64_t width, const HeadBlock<T>& to, const Factor& factor_of) {
  for (int64_t r = 0; r < to.count; ++r, from += width) {
    T* const row = to.row(r);
    const float factor = factor_of(r);
    int64_t d = 0;
    for (; d + kLanes <= to.dim; d += kLanes) store(row + d, load(from + d) * factor);
    if (d < to.dim) store_some(row + d, load(from + d) * factor, static_cast<int>(to.dim - d));
  }
}

// Asks the caches for rows before a task comes to them, a line at a time. The rows of one head lie
// far apart, so that a processor does not foresee them. Few lines can be on their way at once, and
// so products ask for one in each of their steps, beside which it costs nothing.
class ComingRows {
 public:
  // Has room for `most` rows of so many bytes.
  ComingRows(Scratch& scratch, int64_t bytes, int64_t most) : bytes_(bytes) {
    constexpr int64_t kFloats = sizeof(const char*) / sizeof(float);
    next_ = end_ = reinterpret_cast<const char**>(scratch.take(most * kFloats));
  }

  // Adds the rows of a task's head, from its first query on, of each matrix.
  template <class T, int count>
  void add(const CpuElasticAttentionParams& p, const AttentionTask& task,
           const CpuHeadRows (&matrices)[count]) {
    const ExampleRows e(p, task.example);
    for (int64_t r = 0; r < rows_of(p, task); ++r) {
      for (const CpuHeadRows& x : matrices) {
        const HeadBlock<T> block{x, e, task.head, task.first, 0, 0};
        *end_++ = reinterpret_cast<const char*>(block.row(r));
      }
    }
  }

  // How many rows `add` adds of each matrix. Of a long example those to begin with are enough.
  static int64_t rows_of(const CpuElasticAttentionParams& p, const AttentionTask& task) {
    const int64_t rows = ExampleRows(p, task.example).rows() - task.first;
    return rows < kQueryBlock ? rows : kQueryBlock;
  }

  // Asks for the next line, if there is one.
  __attribute__((always_inline)) void ask() {
    if (next_ == end_) return;
    __builtin_prefetch(*next_ + byte_, 0, kSecondCache);
    byte_ += kCacheLine;
    next_ += byte_ >= bytes_;
    byte_ = byte_ >= bytes_ ? 0 : byte_;
  }

 private:
  int64_t bytes_;     // of a row
  int64_t byte_ = 0;  // of the next row
  const char** next_;
  const char** end_;
};

}  // namespace adatape::ADATAPE_ISA
