// The parts of src/core that every backend stands on: geometry, tasks, workspace, 16-bit types.
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <set>

#include "core/layout.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "support.h"

namespace flash_dmattn::testing {
namespace {

// Every element of these tensors holds a number that encodes its place.
double code(std::int64_t sequence, std::int64_t row, std::int64_t head, std::int64_t column) {
  return static_cast<double>(((sequence * 100 + row) * 10 + head) * 10 + column);
}

TEST(Layout, BatchedAndPackedViewsReachTheSameElements) {
  constexpr std::int64_t kSeqlenQ = 3, kSeqlenK = 5, kHeadsQ = 4, kHeadsKv = 2, kHeadDim = 3, kSequences = 2;
  std::int64_t visited = 0;
  for (const bool packed : {false, true}) {
    for (const Strides strides :
         {Strides::kContiguous, Strides::kPermuted, Strides::kGaps, Strides::kReversed}) {
      const auto rows = [&](std::int64_t seqlen, std::int64_t heads) {
        Tensor tensor(
            DType::kFloat32,
            packed ? Index{kSequences * seqlen, heads, kHeadDim} : Index{kSequences, seqlen, heads, kHeadDim},
            strides);
        tensor.for_each([&](const Index& i) {
          tensor.set(i,
                     packed ? code(i[0] / seqlen, i[0] % seqlen, i[1], i[2]) : code(i[0], i[1], i[2], i[3]));
        });
        return tensor;
      };
      const Tensor query = rows(kSeqlenQ, kHeadsQ), key = rows(kSeqlenK, kHeadsKv);
      Tensor bias(DType::kFloat32,
                  packed ? Index{kSequences * kSeqlenK, kHeadsKv} : Index{kSequences, kHeadsKv, kSeqlenK},
                  strides);
      bias.for_each([&](const Index& i) {
        bias.set(i, packed ? code(i[0] / kSeqlenK, i[0] % kSeqlenK, i[1], 0) : code(i[0], i[2], i[1], 0));
      });
      Tensor lse(DType::kFloat32,
                 packed ? Index{kHeadsQ, kSequences * kSeqlenQ} : Index{kSequences, kHeadsQ, kSeqlenQ},
                 strides);
      lse.for_each([&](const Index& i) {
        lse.set(i, packed ? code(i[1] / kSeqlenQ, i[1] % kSeqlenQ, i[0], 0) : code(i[0], i[2], i[1], 0));
      });
      Tensor cu_seqlens_q(DType::kInt32, {3}, strides), cu_seqlens_k(DType::kInt32, {3}, strides);
      for (std::int64_t i = 0; i < 3; ++i) {
        cu_seqlens_q.set({i}, static_cast<double>(i * kSeqlenQ));
        cu_seqlens_k.set({i}, static_cast<double>(i * kSeqlenK));
      }
      ForwardArgs args;
      args.query = query.view();
      args.key = args.value = key.view();
      args.bias = bias.view();
      args.lse = lse.view();
      if (packed) {
        args.cu_seqlens_q = cu_seqlens_q.view();
        args.cu_seqlens_k = cu_seqlens_k.view();
      }

      const Layout layout = make_layout(args);
      EXPECT_EQ(layout.num_sequences, kSequences);
      EXPECT_EQ(layout.group(), 2);
      EXPECT_EQ(layout.head_dim, kHeadDim);
      EXPECT_EQ(layout.max_seqlen_q, kSeqlenQ);
      EXPECT_EQ(layout.max_seqlen_k, kSeqlenK);
      EXPECT_EQ(layout.total_q, kSequences * kSeqlenQ);
      EXPECT_EQ(layout.total_k, kSequences * kSeqlenK);
      for (std::int64_t s = 0; s < kSequences; ++s) {
        const Sequence sequence = layout.sequence(s);
        EXPECT_EQ(sequence.first_position(), kSeqlenK - kSeqlenQ);
        for (std::int64_t head = 0; head < kHeadsQ; ++head) {
          const auto q = layout.q_rows<float>(args.query, sequence, head);
          const auto row_lse = layout.per_query<float>(args.lse, sequence, head);
          for (std::int64_t row = 0; row < sequence.seqlen_q; ++row, ++visited) {
            EXPECT_EQ(row_lse[row], code(s, row, head, 0));
            for (std::int64_t c = 0; c < kHeadDim; ++c) EXPECT_EQ(q.at(row, c), code(s, row, head, c));
          }
        }
        for (std::int64_t head = 0; head < kHeadsKv; ++head) {
          const auto k = layout.k_rows<float>(args.key, sequence, head);
          const auto key_bias = layout.per_key<float>(args.bias, sequence, head);
          for (std::int64_t row = 0; row < sequence.seqlen_k; ++row, ++visited) {
            EXPECT_EQ(key_bias[row], code(s, row, head, 0));
            for (std::int64_t c = 0; c < kHeadDim; ++c) EXPECT_EQ(k.at(row, c), code(s, row, head, c));
          }
        }
      }
      EXPECT_FALSE(layout.per_key<float>(args.expiry, layout.sequence(0), 0).present());
      EXPECT_FALSE(layout.q_rows<float>(args.out, layout.sequence(0), 0).present());
    }
  }
  std::printf("compared %lld rows\n", static_cast<long long>(visited));
}

TEST(Layout, PackedLengths) {
  Tensor score(DType::kFloat32, {9, 2}), cu_seqlens(DType::kInt32, {5});
  const std::int64_t offsets[] = {0, 0, 6, 6, 9};
  for (std::int64_t i = 0; i < 5; ++i) cu_seqlens.set({i}, static_cast<double>(offsets[i]));
  SelectArgs args;
  args.score = score.view();
  args.cu_seqlens = cu_seqlens.view();
  const Layout layout = make_layout(args);
  EXPECT_EQ(layout.num_sequences, 4);
  EXPECT_EQ(layout.max_seqlen_k, 6);
  EXPECT_EQ(layout.heads_kv, 2);
  for (std::int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(layout.sequence(i).begin_k, offsets[i]);
    EXPECT_EQ(layout.sequence(i).seqlen_k, offsets[i + 1] - offsets[i]);
  }
}

TEST(Parallel, EveryTaskRunsOnceOnAKnownWorker) {
  for (const int workers : {1, 2, 3, 7, 64}) {
    for (const bool in_turn : {true, false}) {
      ParallelFor parallel_for = threads(workers).parallel_for;
      if (in_turn) parallel_for.run = ParallelFor::run_in_turn;
      for (const std::int64_t tasks : {0, 1, 2, 6, 7, 1000}) {
        std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
        std::atomic<int> strangers{0};
        for_each_task(parallel_for, tasks, [&](std::int64_t task, int worker) {
          ++runs[static_cast<std::size_t>(task)];
          if (worker < 0 || worker >= std::min<std::int64_t>(workers, tasks)) ++strangers;
        });
        for (const auto& count : runs) EXPECT_EQ(count, 1);
        EXPECT_EQ(strangers, 0);
      }
    }
  }
}

TEST(Workspace, MeasuresWhatItUses) {
  struct Parts {
    double* a;
    std::int32_t* b;
    char* c;
  };
  const auto cut = [](Arena& arena) {
    return Parts{arena.take<double>(5), arena.take<std::int32_t>(33), arena.take<char>(1)};
  };
  Arena measure;
  EXPECT_EQ(cut(measure).a, nullptr);
  EXPECT_EQ(measure.bytes(), 64 + 192 + 64 + 63u);
  for (std::size_t shift = 0; shift < 64; ++shift) {
    std::vector<unsigned char> memory(measure.bytes() + shift);
    const Workspace workspace{.data = memory.data() + shift, .bytes = measure.bytes()};
    Arena arena(workspace);
    const Parts parts = cut(arena);
    for (const void* part :
         {static_cast<void*>(parts.a), static_cast<void*>(parts.b), static_cast<void*>(parts.c)}) {
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(part) % kWorkspaceAlignment, 0u);
      EXPECT_GE(part, workspace.data);
      EXPECT_LE(static_cast<const unsigned char*>(part) + 64, memory.data() + memory.size());
    }
    EXPECT_EQ(static_cast<void*>(parts.b), static_cast<void*>(parts.a + 8));
    EXPECT_EQ(static_cast<void*>(parts.c), static_cast<void*>(parts.b + 48));
  }
  Arena nothing;
  EXPECT_EQ(nothing.bytes(), 0u);
}

// What nobody can lend is not measured as little.
TEST(Workspace, HugeSizesDoNotWrap) {
  constexpr std::size_t kHuge = std::size_t{1} << 61;
  for (const std::size_t copies : {std::size_t{1}, std::size_t{8}, kHuge}) {
    Arena arena;
    arena.take<char>(10);
    arena.take<double>(kHuge, copies);
    arena.take<char>(kHuge);
    EXPECT_GE(arena.bytes(), kHuge);
  }
  // One row, one key, everything repeated: 2^23 heads of 2^23 columns for each of 2^16 workers.
  constexpr std::int64_t kMany = 1 << 23;
  float number = 0, bias = 0, dbias = 0;
  BackwardArgs args;
  args.query = contiguous_view(&number, DType::kFloat32, {1, 1, kMany, kMany});
  args.query.stride = {};
  args.out = args.dout = args.query;
  args.key = args.value = contiguous_view(&number, DType::kFloat32, {1, 1, 1, kMany});
  args.key.stride = args.value.stride = {};
  args.lse = contiguous_view(&number, DType::kFloat32, {1, kMany, 1});
  args.lse.stride = {};
  args.bias = contiguous_view(&bias, DType::kFloat32, {1, 1, 1});
  args.dbias = contiguous_view(&dbias, DType::kFloat32, {1, 1, 1});
  Target target;
  target.parallel_for.num_workers = 1 << 16;
  EXPECT_EQ(why_unsupported(args, target), "");
  EXPECT_GE(workspace_bytes(args, target), std::size_t{1} << 62);
}

// The value of a 16-bit pattern with this many bits of exponent and mantissa, from the definition of the
// formats.
double decode(std::uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(std::ldexp(1, mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

struct Format {
  const char* name;
  int exponent_bits, mantissa_bits;
  float (*widen)(std::uint16_t);
  std::uint16_t (*narrow)(float);
};
constexpr Format kFormats[] = {{"bfloat16", 8, 7, bfloat16_to_float, float_to_bfloat16},
                               {"float16", 5, 10, float16_to_float, float_to_float16}};

TEST(Numeric, EveryPatternWidensExactlyAndComesBack) {
  for (const Format& format : kFormats) {
    for (std::uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
      const auto bits = static_cast<std::uint16_t>(pattern);
      const double want = decode(bits, format.exponent_bits, format.mantissa_bits);
      const float got = format.widen(bits);
      if (std::isnan(want)) {
        ASSERT_TRUE(std::isnan(got)) << format.name << " " << pattern;
        ASSERT_TRUE(std::isnan(decode(format.narrow(got), format.exponent_bits, format.mantissa_bits)));
      } else {
        ASSERT_EQ(got, want) << format.name << " " << pattern;
        ASSERT_EQ(std::signbit(got), std::signbit(want));
        ASSERT_EQ(format.narrow(got), bits) << format.name << " " << pattern;
      }
    }
  }
}

// Halfway between two neighbours, and one float to either side of it, around every finite value.
TEST(Numeric, NarrowingRoundsToNearestEven) {
  for (const Format& format : kFormats) {
    const std::uint32_t infinity = ((1u << format.exponent_bits) - 1) << format.mantissa_bits;
    for (std::uint32_t pattern = 0; pattern < infinity; ++pattern) {
      const auto low = static_cast<std::uint16_t>(pattern);
      const auto high =
          static_cast<std::uint16_t>(pattern + 1);  // infinity is reached from half a step above
      const double below = decode(low, format.exponent_bits, format.mantissa_bits);
      const double above = high == infinity
                               ? below + (below - decode(static_cast<std::uint16_t>(low - 1),
                                                         format.exponent_bits, format.mantissa_bits))
                               : decode(high, format.exponent_bits, format.mantissa_bits);
      const auto middle = static_cast<float>((below + above) / 2);
      ASSERT_EQ(middle, (below + above) / 2);
      const std::uint16_t even = (low & 1) == 0 ? low : high;
      ASSERT_EQ(format.narrow(middle), even) << format.name << " " << pattern;
      ASSERT_EQ(format.narrow(std::nextafter(middle, 0.0f)), low) << format.name << " " << pattern;
      ASSERT_EQ(format.narrow(std::nextafter(middle, INFINITY)), high) << format.name << " " << pattern;
      ASSERT_EQ(format.narrow(-middle), even | 0x8000) << format.name << " " << pattern;
    }
  }
}

TEST(Build, SaysWhatItIs) {
  EXPECT_STREQ(version(), FLASH_DMATTN_VERSION);
  EXPECT_EQ(describe_build().substr(0, 5), "cpu (");
}

}  // namespace
}  // namespace flash_dmattn::testing
