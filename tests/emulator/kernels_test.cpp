// The CUDA kernels of attention and of the plan, on the emulator, against the definition in float64.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "attention_case.h"

namespace flash_dmattn::testing {
namespace {

constexpr Target kCuda{.device_type = DeviceType::kCuda};
constexpr DType kTypes[] = {DType::kBFloat16, DType::kFloat16};
constexpr Visibility kVisibilities[] = {Visibility::kAll, Visibility::kWindow, Visibility::kRandomExpiry};

class Kernels : public ::testing::Test {
 protected:
  void TearDown() override { unsetenv("FLASH_DMATTN_EMULATOR_SEED"); }
  static void TearDownTestSuite() {
    std::printf("compared %lld elements with the oracle\n", static_cast<long long>(elements_compared));
  }
};

void set_seed(int seed) { setenv("FLASH_DMATTN_EMULATOR_SEED", std::to_string(seed).c_str(), 1); }

Case small_case(DType dtype, bool packed, bool causal, Visibility visibility) {
  Case c{.dtype = dtype,
         .sequences = {{70, 140}, {70, 140}},
         .packed = packed,
         .heads_kv = 2,
         .group = 2,
         .head_dim = 40,
         .causal = causal,
         .visibility = visibility,
         .keep_window = 13,
         .disabled_keys = 0.2,
         .on_cuda = true};
  if (packed) c.sequences = {{0, 0}, {5, 33}, {0, 7}, {64, 64}, {1, 1}, {40, 100}};
  return c;
}

TEST_F(Kernels, EveryTypeAndVisibility) {
  for (const DType dtype : kTypes) {
    for (const bool packed : {false, true}) {
      for (const bool causal : {true, false}) {
        for (const Visibility visibility : kVisibilities) {
          check_case(small_case(dtype, packed, causal, visibility), 1, kCuda);
        }
      }
    }
  }
}

TEST_F(Kernels, EveryHeadDimAndGroup) {
  for (const std::int64_t head_dim : {8, 64, 72, 128, 136, 256}) {
    // All keys: rows visit several tiles of them.
    Case c = small_case(DType::kBFloat16, false, true,
                        head_dim % 64 == 0 ? Visibility::kAll : Visibility::kWindow);
    c.head_dim = head_dim;
    c.scale = 0.1;
    check_case(c, 2, kCuda);
  }
  for (const std::int64_t group : {1, 2, 5, 16}) {
    Case c = small_case(DType::kFloat16, false, true, Visibility::kRandomExpiry);
    c.group = group;
    check_case(c, 3, kCuda);
  }
}

// The plan cuts the keys into several segments.
TEST_F(Kernels, LongSequences) {
  for (const bool packed : {false, true}) {
    Case c = small_case(DType::kBFloat16, packed, true, Visibility::kWindow);
    c.sequences = {{80, 4500}};
    if (packed) c.sequences = {{30, 2100}, {3, 3}, {50, 4200}};
    c.keep_window = 300;
    c.heads_kv = 1;
    check_case(c, 4, kCuda);
  }
}

// Every ring of tiles goes round several times.
TEST_F(Kernels, ManyKeys) {
  for (const int seed : {0, 1}) {
    set_seed(seed);
    for (const std::int64_t head_dim : {64, 128}) {
      Case c = small_case(DType::kBFloat16, false, true, seed == 0 ? Visibility::kAll : Visibility::kWindow);
      c.sequences = {{20, 700}};
      c.keep_window = 600;
      c.heads_kv = 1;
      c.head_dim = head_dim;
      c.scale = 0.1;
      check_case(c, 12, kCuda);
    }
  }
}

TEST_F(Kernels, AnyOrderOfThreads) {
  for (int seed = 1; seed <= 2; ++seed) {
    set_seed(seed);
    SCOPED_TRACE("emulator's seed " + std::to_string(seed));
    for (const Visibility visibility : kVisibilities) {
      check_case(small_case(DType::kBFloat16, seed % 2 == 0, true, visibility), 5, kCuda);
    }
  }
}

std::vector<std::vector<unsigned char>> bits(const Outputs& outputs) {
  const Gradients& gradients = outputs.gradients;
  return {outputs.out.elements(),  outputs.lse.elements(),  gradients.dq.elements(),
          gradients.dk.elements(), gradients.dv.elements(), gradients.dbias.elements()};
}

TEST_F(Kernels, SameBitsInAnyOrderAndWhateverTheWorkspaceHolds) {
  for (const Visibility visibility : kVisibilities) {
    const Problem problem(small_case(DType::kFloat16, true, true, visibility), 6);
    const Expectation expectation = expect(problem);
    const auto once = bits(run_case(problem, expectation, kCuda));
    EXPECT_EQ(bits(run_case(problem, expectation, kCuda, Poison::kLarge)), once);
    for (int seed = 1; seed <= 3; ++seed) {
      set_seed(seed);
      EXPECT_EQ(bits(run_case(problem, expectation, kCuda)), once) << "seed " << seed;
    }
    unsetenv("FLASH_DMATTN_EMULATOR_SEED");
  }
}

// A plan of its own gives the bits of the plan that forward makes.
TEST_F(Kernels, AGivenPlan) {
  const Problem problem(small_case(DType::kBFloat16, true, true, Visibility::kWindow), 7);
  ForwardArgs args = problem.forward_args();
  PlanArgs plan_args{.expiry = args.expiry,
                     .bias = args.bias,
                     .cu_seqlens_q = args.cu_seqlens_q,
                     .cu_seqlens_k = args.cu_seqlens_k,
                     .causal = args.causal};
  const Tensor plan_memory(DType::kInt32, {static_cast<std::int64_t>(plan_elements(plan_args, kCuda))});
  plan_args.plan = plan_memory.view();
  run(plan, plan_args, kCuda);
  const auto results = [&](const TensorView& plan_view) {
    const Tensor out = problem.like_query(), lse = problem.like_lse();
    args.out = out.view();
    args.lse = lse.view();
    args.plan = plan_view;
    run(forward, args, kCuda);
    auto both = out.elements();
    const auto more = lse.elements();
    both.insert(both.end(), more.begin(), more.end());
    return both;
  };
  EXPECT_EQ(results(plan_memory.view()), results(TensorView{}));
}

// CMakeLists.txt runs this with the limits of several GPUs; the emulator refuses launches that exceed them.
TEST_F(Kernels, SharedMemoryOfTheDevice) {
  for (const std::int64_t head_dim : {64, 128, 256}) {
    Case c = small_case(DType::kBFloat16, false, true, Visibility::kWindow);
    c.sequences = {{70, 144}};
    c.head_dim = head_dim;
    c.scale = 0.1;
    check_case(c, 8, kCuda);
    c.visibility = Visibility::kAll;
    for (const auto heads : {DenseForm::kOne, DenseForm::kOfQueries}) {
      c.mask = DenseForm{.heads = DenseForm::kOfKeys};
      c.dense_bias = DenseForm{.heads = heads};
      c.dense_dtype = heads == DenseForm::kOne ? DType::kFloat32 : DType::kBFloat16;
      check_case(c, 8, kCuda);
    }
    c.mask = c.dense_bias = std::nullopt;
    c.sequences = {{2, 1200}};  // decode
    check_case(c, 8, kCuda);
  }
}

// Every form of mask and bias, of every type.
TEST_F(Kernels, MasksAndDenseBiases) {
  constexpr DType kDenseTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  std::uint64_t seed = 10;
  for (const bool batch : {true, false}) {
    for (const auto heads : {DenseForm::kOne, DenseForm::kOfKeys, DenseForm::kOfQueries}) {
      for (const bool rows : {true, false}) {
        Case c = small_case(kTypes[seed % 2], false, seed % 3 != 0, kVisibilities[seed / 2 % 3]);
        c.mask = DenseForm{!batch, DenseForm::kOfQueries, true};
        c.dense_bias = DenseForm{batch, heads, rows};
        c.dense_dtype = kDenseTypes[seed % 3];
        c.masked = 0.7;
        check_case(c, seed++, kCuda);
        std::swap(c.mask, c.dense_bias);
        check_case(c, seed++, kCuda);
      }
    }
  }
}

TEST_F(Kernels, DenseInAnyOrderOfThreads) {
  Case c = small_case(DType::kBFloat16, false, true, Visibility::kAll);
  c.mask = DenseForm{.heads = DenseForm::kOfKeys};
  for (int seed = 1; seed <= 3; ++seed) {
    set_seed(seed);
    c.dense_bias = seed == 1 ? DenseForm{} : DenseForm{.heads = DenseForm::kOne};
    c.dense_dtype = seed == 2 ? DType::kFloat32 : DType::kBFloat16;
    c.masked = seed == 3 ? 0.97 : 0.5;
    check_case(c, 11, kCuda);
  }
}

TEST_F(Kernels, NoHeads) {
  for (const bool dense : {false, true}) {
    for (const std::int64_t heads_kv : {0, 2}) {
      Case c = small_case(DType::kBFloat16, false, true, Visibility::kAll);
      c.heads_kv = heads_kv;
      c.group = heads_kv == 0 ? 1 : 0;
      if (dense) c.dense_bias = DenseForm{.heads = DenseForm::kOne};
      check_case(c, 12, kCuda);
    }
  }
}

TEST_F(Kernels, RandomCases) {
  Random random(9);
  for (int i = 0; i < 40; ++i) {
    Case c = random_case(random);
    c.on_cuda = true;
    c.dtype = random.pick({DType::kBFloat16, DType::kFloat16});
    c.head_dim = (c.head_dim + 7) / 8 * 8;
    if (c.strides != Strides::kPermuted) c.strides = Strides::kContiguous;
    if (c.dense_dtype == DType::kFloat64) c.dense_dtype = DType::kFloat32;
    check_case(c, static_cast<std::uint64_t>(i), kCuda);
  }
}

}  // namespace
}  // namespace flash_dmattn::testing
