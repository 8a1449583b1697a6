// The tables of configurations against the shared memory of every GPU, which takes no GPU.
#include <gtest/gtest.h>

#include <span>
#include <string>
#include <vector>

#include "cuda/sm80/instances.h"

namespace flash_dmattn::cuda::sm80 {
namespace {

// What a CTA can get where the compute capability is 8.6, 8.9 or 12.0; 8.0 or 8.7; 9.0 or 10.0.
constexpr std::size_t kLimits[] = {99 * 1024, 163 * 1024, 227 * 1024};
constexpr DType kTypes[] = {DType::kBFloat16, DType::kFloat16};
constexpr int kMaxHeadDim = 256;
// Of an element of a dense bias; 0: there is none.
constexpr int kBiasBytes[] = {0, 2, 4};

std::vector<NamedTable> all_tables() {
  std::vector<NamedTable> all;
  for (const auto& of_file : {forward_tables(), backward_tables(), decode_tables(), dense_forward_tables(),
                              dense_backward_tables(), dense_bias_grad_tables()}) {
    all.insert(all.end(), of_file.begin(), of_file.end());
  }
  return all;
}

std::span<const Configuration> rows(const NamedTable& table) { return table.configurations; }

TEST(Tables, EveryHeadDimOnEveryDevice) {
  for (const NamedTable& table : all_tables()) {
    for (const DType dtype : kTypes) {
      for (int head_dim = 1; head_dim <= kMaxHeadDim; ++head_dim) {
        for (const std::size_t limit : kLimits) {
          for (const int bias_bytes : kBiasBytes) {
            SCOPED_TRACE(std::string(table.name) + ", " + dtype_name(dtype) + ", head dim " +
                         std::to_string(head_dim) + ", " + std::to_string(limit) + " bytes, bias of " +
                         std::to_string(bias_bytes));
            const auto [chosen, staged] = choose(rows(table), dtype, head_dim, bias_bytes, limit);
            ASSERT_NE(chosen, nullptr);
            EXPECT_EQ(chosen->dtype, dtype);
            EXPECT_GE(chosen->head_dim, head_dim);
            EXPECT_LE(chosen->head_dim, head_dim <= 64 ? 64 : 2 * head_dim);
            EXPECT_LE(chosen->shared_bytes(staged ? bias_bytes : 0), limit);
          }
        }
        EXPECT_EQ(choose(rows(table), dtype, head_dim, 0, 1024).instance, nullptr) << table.name;
      }
      EXPECT_EQ(choose(rows(table), dtype, kMaxHeadDim + 1, 0, kLimits[2]).instance, nullptr) << table.name;
    }
  }
}

// That there is one for each device, and none that a device could never run.
TEST(Tables, EveryConfigurationCanRun) {
  for (const NamedTable& table : all_tables()) {
    int last_head_dim = 0;
    for (const Configuration& configuration : table.configurations) {
      SCOPED_TRACE(std::string(table.name) + ", head dim " + std::to_string(configuration.head_dim));
      EXPECT_GE(configuration.head_dim, last_head_dim);
      last_head_dim = configuration.head_dim;
      EXPECT_TRUE(configuration.threads % 32 == 0 && configuration.threads <= 1024) << configuration.threads;
      EXPECT_TRUE(configuration.ctas_per_sm >= 1 &&
                  configuration.ctas_per_sm * configuration.threads <= 1536)  // the least of any device
          << configuration.ctas_per_sm;
      EXPECT_LE(configuration.shared_bytes(0), kLimits[2]);
      for (const int bias_bytes : kBiasBytes) {
        EXPECT_GE(configuration.shared_bytes(bias_bytes), configuration.shared_bytes(0));
      }
    }
  }
}

TEST(Tables, Choice) {
  const auto make = [](int head_dim, int ctas_per_sm, std::size_t (*bytes)(int)) {
    return Configuration{DType::kBFloat16, head_dim, 64, 128, ctas_per_sm, bytes};
  };
  const Configuration table[] = {
      make(64, 2, [](int bias_bytes) -> std::size_t { return (60 + 10 * bias_bytes) * 1024; }),
      make(64, 2, [](int bias_bytes) -> std::size_t { return (40 + 10 * bias_bytes) * 1024; }),
      make(128, 1, [](int) -> std::size_t { return 80 * 1024; }),
  };
  const auto chosen = [&](int head_dim, int bias_bytes, std::size_t limit) {
    const auto choice =
        choose(std::span<const Configuration>(table), DType::kBFloat16, head_dim, bias_bytes, limit * 1024);
    return std::pair{choice.instance == nullptr ? -1 : choice.instance - table, choice.staged};
  };
  using Expected = std::pair<std::ptrdiff_t, bool>;
  EXPECT_EQ(chosen(64, 0, 227), Expected(0, false));
  EXPECT_EQ(chosen(64, 0, 99), Expected(1, false));   // two CTAs with 40 KB, but not with 60
  EXPECT_EQ(chosen(64, 0, 70), Expected(0, false));   // one CTA of either
  EXPECT_EQ(chosen(64, 0, 50), Expected(1, false));   // one CTA, of the second only
  EXPECT_EQ(chosen(64, 2, 227), Expected(0, true));   // 80 KB
  EXPECT_EQ(chosen(64, 4, 163), Expected(1, true));   // two CTAs with 80 KB, but not with 100
  EXPECT_EQ(chosen(64, 4, 79), Expected(0, false));   // no room for the bias, and one CTA without
  EXPECT_EQ(chosen(64, 0, 39), Expected(-1, false));  // the larger head dim is no way out
  EXPECT_EQ(chosen(65, 0, 99), Expected(2, false));
  EXPECT_EQ(chosen(65, 0, 79), Expected(-1, false));
}

}  // namespace
}  // namespace flash_dmattn::cuda::sm80
