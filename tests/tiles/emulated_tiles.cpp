// Runs AMX's instructions on a processor that does not have them. Such a processor refuses each of
// them, upon which Linux sends SIGILL; the handler here reads the instruction, does what Intel's
// manual ("Intel Advanced Matrix Extensions" in volume 2) says that it does, and goes on behind it.
// So the very code that a processor with tiles would run is tested, as the compiler made it.
//
// What the manual gives as a fault ends the process, with a line that says which.

#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kTiles = 8, kMostRows = 16, kMostRowBytes = 64;

struct EmulatedTile {
  unsigned char bytes[kMostRows][kMostRowBytes];
  int rows, row_bytes;
};

// The tiles of a thread, which has none before it has configured them.
struct ThreadTiles {
  bool configured;
  EmulatedTile tile[kTiles];
};

constexpr int kMostThreads = 256;
ThreadTiles all_tiles[kMostThreads];
std::atomic<int> threads{0};
std::atomic<int64_t> products{0}, releases{0};
// A signal's handler may not allocate memory, as other forms of thread-local memory may.
__attribute__((tls_model("initial-exec"))) thread_local ThreadTiles* own = nullptr;

// What was done with SIGILL before.
struct sigaction before;

[[noreturn]] void fault(const char* what) {
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::_Exit(70);
}

ThreadTiles& tiles_of_thread() {
  if (own == nullptr) {
    const int index = threads++;
    if (index >= kMostThreads) fault("more threads than there is room for");
    own = &all_tiles[index];
  }
  return *own;
}

EmulatedTile& configured(int number) {
  ThreadTiles& tiles = tiles_of_thread();
  if (!tiles.configured) fault("an instruction before LDTILECFG, or after TILERELEASE");
  if (number >= kTiles) fault("a tile with a number above 7");
  EmulatedTile& tile = tiles.tile[number];
  if (tile.rows == 0 || tile.row_bytes == 0) fault("a tile that was not configured");
  return tile;
}

void configure(const unsigned char* from) {
  ThreadTiles& tiles = tiles_of_thread();
  std::memset(static_cast<void*>(&tiles), 0, sizeof tiles);
  if (from[0] == 0) return;
  if (from[0] != 1) fault("LDTILECFG: an unknown palette");
  if (from[1] != 0) fault("LDTILECFG: a start row, which is for interrupted instructions only");
  for (int i = 2; i < 16; ++i) {
    if (from[i] != 0) fault("LDTILECFG: a reserved byte that is not 0");
  }
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, from + 16 + 2 * i, sizeof row_bytes);
    const int rows = from[48 + i];
    if (i >= kTiles && (rows != 0 || row_bytes != 0)) fault("LDTILECFG: more than 8 tiles");
    if (rows > kMostRows) fault("LDTILECFG: more than 16 rows");
    if (row_bytes > kMostRowBytes) fault("LDTILECFG: more than 64 bytes in a row");
    if ((rows == 0) != (row_bytes == 0)) fault("LDTILECFG: a tile with rows or bytes alone");
    if (i < kTiles) tiles.tile[i].rows = rows, tiles.tile[i].row_bytes = row_bytes;
  }
  tiles.configured = true;
}

void zero(EmulatedTile& tile) { std::memset(tile.bytes, 0, sizeof tile.bytes); }

void load(EmulatedTile& tile, const char* from, int64_t stride) {
  zero(tile);
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(tile.bytes[r], from + r * stride, static_cast<size_t>(tile.row_bytes));
  }
}

void store(const EmulatedTile& tile, char* to, int64_t stride) {
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(to + r * stride, tile.bytes[r], static_cast<size_t>(tile.row_bytes));
  }
}

float number_at(const unsigned char* pair, int which) {
  uint16_t half;
  std::memcpy(&half, pair + 2 * which, sizeof half);
  const uint32_t bits = uint32_t{half} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// TDPBF16PS. The numbers of even and of odd place are summed apart, each by fused multiply-adds in
// the order of the depth, and only then added to each other and to the tile.
void multiply_add(EmulatedTile& sum, const EmulatedTile& a, const EmulatedTile& b) {
  if (a.rows != sum.rows || b.row_bytes != sum.row_bytes || a.row_bytes / 4 != b.rows) {
    fault("TDPBF16PS: tiles that do not fit each other");
  }
  if (a.row_bytes % 4 != 0 || b.row_bytes % 4 != 0) fault("TDPBF16PS: a part of a pair");
  const unsigned before_rounding = _mm_getcsr();
  // All exceptions are masked, numbers below the normal ones are 0, and sums round to nearest.
  _mm_setcsr(0x9fc0);
  constexpr int kMostColumns = kMostRowBytes / 4;
  const int columns = sum.row_bytes / 4;
  float right_even[kMostRows][kMostColumns] = {}, right_odd[kMostRows][kMostColumns] = {};
  for (int k = 0; k < b.rows; ++k) {
    for (int n = 0; n < columns; ++n) {
      right_even[k][n] = number_at(b.bytes[k] + 4 * n, 0);
      right_odd[k][n] = number_at(b.bytes[k] + 4 * n, 1);
    }
  }
  for (int m = 0; m < sum.rows; ++m) {
    float even[kMostColumns] = {}, odd[kMostColumns] = {}, values[kMostColumns];
    for (int k = 0; k < b.rows; ++k) {
      const float left_even = number_at(a.bytes[m] + 4 * k, 0);
      const float left_odd = number_at(a.bytes[m] + 4 * k, 1);
      for (int n = 0; n < kMostColumns; ++n) {
        even[n] = std::fma(left_even, right_even[k][n], even[n]);
        odd[n] = std::fma(left_odd, right_odd[k][n], odd[n]);
      }
    }
    std::memcpy(values, sum.bytes[m], sizeof values);
    for (int n = 0; n < columns; ++n) values[n] += even[n] + odd[n];
    std::memcpy(sum.bytes[m], values, sizeof values);
  }
  _mm_setcsr(before_rounding);
  ++products;
}

// The registers in the order in which instructions number them.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};

// An instruction with a VEX prefix of three bytes.
struct Instruction {
  const unsigned char* start;
  greg_t* registers;
  int map, prefix, opcode;  // the prefix is 0 for none, 1 for 66, 2 for F3, 3 for F2
  bool wide;                // VEX.W
  bool long_vector;         // VEX.L
  int mod, reg, rm, third;  // operands; the third is that of VEX.vvvv
  char* address = nullptr;  // of a memory operand, without its index
  int64_t stride = 0;       // its scaled index
  bool has_sib = false;
  int length;

  Instruction(const unsigned char* at, greg_t* of) : start(at), registers(of) {
    const bool r = !(at[1] & 0x80), x = !(at[1] & 0x40), b = !(at[1] & 0x20);
    map = at[1] & 0x1f;
    wide = at[2] & 0x80;
    third = (~at[2] >> 3) & 0xf;
    long_vector = at[2] & 4;
    prefix = at[2] & 3;
    opcode = at[3];
    mod = at[4] >> 6, reg = ((at[4] >> 3) & 7) + 8 * r, rm = (at[4] & 7) + 8 * b;
    length = 5;
    if (mod == 3) return;
    bool relative = mod == 0 && (at[4] & 7) == 5, based = !relative;
    int base = rm;
    if ((at[4] & 7) == 4) {
      has_sib = true;
      const int scale = at[5] >> 6, index = ((at[5] >> 3) & 7) + 8 * x;
      base = (at[5] & 7) + 8 * b;
      based = !(mod == 0 && (at[5] & 7) == 5);
      if (index != 4) stride = value_of(index) * (int64_t{1} << scale);
      ++length;
    }
    int64_t displacement = 0;
    if (mod == 1) {
      displacement = static_cast<signed char>(at[length]);
      length += 1;
    } else if (mod == 2 || !based) {
      int32_t four;
      std::memcpy(&four, at + length, sizeof four);
      displacement = four;
      length += 4;
    }
    int64_t from = based ? value_of(base) : 0;
    if (relative) from = reinterpret_cast<int64_t>(at + length);
    address = reinterpret_cast<char*>(from + displacement);
  }

  int64_t value_of(int number) const { return registers[kRegisters[number]]; }
};

// Does the instruction; returns its length, or 0 where it is none of AMX's that are known here.
int run(const unsigned char* at, greg_t* registers) {
  if (at[0] != 0xc4) return 0;
  const Instruction i(at, registers);
  if (i.map != 2 || i.wide || i.long_vector) return 0;
  const bool memory = i.mod != 3;
  if (i.opcode != 0x5c && i.third != 0) return 0;
  if (i.opcode == 0x49 && i.prefix == 0 && memory && i.reg == 0) {  // LDTILECFG
    configure(reinterpret_cast<const unsigned char*>(i.address + i.stride));
  } else if (i.opcode == 0x49 && i.prefix == 0 && at[4] == 0xc0) {  // TILERELEASE
    std::memset(static_cast<void*>(&tiles_of_thread()), 0, sizeof(ThreadTiles));
    ++releases;
  } else if (i.opcode == 0x49 && i.prefix == 3 && !memory) {  // TILEZERO
    zero(configured(i.reg));
  } else if (i.opcode == 0x4b && i.prefix == 3 && i.has_sib) {  // TILELOADD
    load(configured(i.reg), i.address, i.stride);
  } else if (i.opcode == 0x4b && i.prefix == 2 && i.has_sib) {  // TILESTORED
    store(configured(i.reg), i.address, i.stride);
  } else if (i.opcode == 0x5c && i.prefix == 2 && !memory) {  // TDPBF16PS
    multiply_add(configured(i.reg), configured(i.rm), configured(i.third));
  } else {
    return 0;
  }
  return i.length;
}

void on_illegal_instruction(int, siginfo_t*, void* at_signal) {
  greg_t* const registers = static_cast<ucontext_t*>(at_signal)->uc_mcontext.gregs;
  const greg_t first = registers[REG_RIP];
  int length;
  do {  // Those that follow at once are done too, as a signal takes longer than an instruction.
    length = run(reinterpret_cast<const unsigned char*>(registers[REG_RIP]), registers);
    registers[REG_RIP] += length;
  } while (length > 0);
  // What is none of ours comes again at once, to what was there before.
  if (registers[REG_RIP] == first) sigaction(SIGILL, &before, nullptr);
}

__attribute__((constructor)) void begin() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGILL, &action, &before);
}

}  // namespace

// How many products of tiles were computed, how often a thread's tiles were released, and how many
// threads' tiles are in use now.
extern "C" __attribute__((visibility("default"))) int64_t adatape_tile_products() {
  return products;
}
extern "C" __attribute__((visibility("default"))) int64_t adatape_tile_releases() {
  return releases;
}
extern "C" __attribute__((visibility("default"))) int64_t adatape_tiles_in_use() {
  int64_t in_use = 0;
  for (const ThreadTiles& tiles : all_tiles) in_use += tiles.configured;
  return in_use;
}
