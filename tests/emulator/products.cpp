// Operands of a warpgroup's products in shared memory, and the products. Multiplications are exact, sums are
// in float32, one k after another.
#include <cstring>

#include "core/numeric.h"
#include "emulator/warpgroups.h"
#include "machine_state.h"

namespace emulator {
namespace {

constexpr std::uint32_t kRowBytes = 128;
constexpr std::uint32_t kAtomBytes = 1024;

// The fields of a descriptor, in bytes: where the tile begins, what lies between neighbouring 64 columns of
// an MN-major tile, and between atoms of 8 rows.
struct Tile {
  std::uint32_t start, column_bytes, atom_bytes;

  explicit Tile(std::uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        column_bytes((descriptor >> 16 & 0x3fff) << 4),
        atom_bytes((descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0 || atom_bytes == 0 ||
        atom_bytes % kAtomBytes != 0) {
      fail("wgmma: the descriptor %016llx is not of atoms of 1024 bytes with 128-byte swizzle",
           static_cast<unsigned long long>(descriptor));
    }
  }

  std::uint32_t row(int row) const {
    const auto r = static_cast<std::uint32_t>(row);
    return start + r / 8 * atom_bytes + r % 8 * kRowBytes;
  }
};

// The 8 elements at an address that counts as if there were no swizzle.
void read_chunk(std::uint32_t address, std::uint16_t* to, std::uint32_t fence_time) {
  address ^= (address / kRowBytes % 8) * 16;
  std::memcpy(to, shared_pointer(address, 16), 16);
  const CopiedChunk& copied = machine.copied[address / 16];
  if (copied.time > fence_time && copied.time > machine.threads[copied.thread].fence_time) {
    fail(
        "wgmma reads shared address %u, which thread %u wrote by cp_async, without fence_async_proxy between",
        address, copied.thread);
  }
}

// 32 bytes of each row.
void read_k_major(std::uint64_t descriptor, int first_row, int num_rows, std::uint16_t* to,
                  std::uint32_t fence_time) {
  const Tile tile(descriptor);
  if (tile.start % kAtomBytes > kRowBytes - 32) {
    fail("wgmma: the K-major tile at shared address %u is not 0 .. 96 bytes beyond a multiple of 1024",
         tile.start);
  }
  for (int row = first_row; row < first_row + num_rows; ++row) {
    const std::uint32_t address = tile.row(row);
    read_chunk(address, to + row * 16, fence_time);
    read_chunk(address + 16, to + row * 16 + 8, fence_time);
  }
}

// 16 rows of `columns`.
void read_mn_major(std::uint64_t descriptor, int columns, std::uint16_t* to, std::uint32_t fence_time) {
  const Tile tile(descriptor);
  if (tile.start % kAtomBytes != 0 || (columns > 64 && tile.column_bytes % kAtomBytes != 0)) {
    fail(
        "wgmma: of an MN-major tile the shared address %u and the %u bytes between columns must be multiples "
        "of 1024",
        tile.start, tile.column_bytes);
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < columns; n += 8) {
      const std::uint32_t address = tile.row(k) + static_cast<std::uint32_t>(n / 64) * tile.column_bytes +
                                    static_cast<std::uint32_t>(n % 64) * 2;
      read_chunk(address, to + k * columns + n, fence_time);
    }
  }
}

void widen(HalfType type, const std::uint16_t* from, float* to, int count) {
  if (type == HalfType::kBFloat16) {
    for (int i = 0; i < count; ++i) to[i] = flash_dmattn::bfloat16_to_float(from[i]);
  } else {
    for (int i = 0; i < count; ++i) to[i] = flash_dmattn::float16_to_float(from[i]);
  }
}

// sum [64][columns] += a [64][16] * b [16][columns].
inline __attribute__((always_inline)) void add_product(const float* __restrict a, const float* __restrict b,
                                                       int columns, float* __restrict sum) {
  for (int m = 0; m < 64; ++m) {
    float* __restrict row = sum + m * columns;
    for (int k = 0; k < 16; k += 4) {
      const float* __restrict a_k = a + m * 16 + k;
      const float* __restrict b_k = b + k * columns;
      for (int n = 0; n < columns; ++n) {
        float value = row[n];
        value += a_k[0] * b_k[n];
        value += a_k[1] * b_k[columns + n];
        value += a_k[2] * b_k[2 * columns + n];
        value += a_k[3] * b_k[3 * columns + n];
        row[n] = value;
      }
    }
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void add_product_avx2(const float* a, const float* b, int columns,
                                                      float* sum) {
  add_product(a, b, columns, sum);
}
#endif

}  // namespace

void read_rows(const Product& product, int first_row, int num_rows, Operands& to, std::uint32_t fence_time) {
  read_k_major(product.a, first_row, num_rows, to.a, fence_time);
}

void read_columns(const Product& product, Operands& to, std::uint32_t fence_time) {
  if (product.a != 0) {
    read_k_major(product.b, 0, product.columns, to.b, fence_time);
  } else {
    read_mn_major(product.b, product.columns, to.b, fence_time);
  }
}

void multiply(const Product& product, const Operands& operands, float* sum) {
  static float a[64 * 16];
  static float b[16 * kMaxProductColumns];
  const int columns = product.columns;
  widen(product.type, operands.a, a, 64 * 16);
  if (product.a != 0) {
    static float transposed[16 * kMaxProductColumns];
    widen(product.type, operands.b, transposed, 16 * columns);
    for (int n = 0; n < columns; ++n) {
      for (int k = 0; k < 16; ++k) b[k * columns + n] = transposed[n * 16 + k];
    }
  } else {
    widen(product.type, operands.b, b, 16 * columns);
  }
  if (!product.accumulate) std::memset(sum, 0, sizeof(float) * 64 * columns);
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) return add_product_avx2(a, b, columns, sum);
#endif
  add_product(a, b, columns, sum);
}

}  // namespace emulator
