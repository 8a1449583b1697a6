// Runs a fuzz target without libFuzzer, the same inputs in every run: a few fixed ones, and random mutations
// of them and of each other.
//
//   fuzz_<target> RUNS [SEED]      that many inputs; the one in hand when it dies is left in
//   fuzz_<target>.input fuzz_<target> FILE...          these inputs
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "fuzz_input.h"

namespace flash_dmattn::testing {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kLongest = 512;

std::vector<Bytes> fixed_inputs() {
  std::vector<Bytes> inputs = {{}, Bytes(64, 0), Bytes(kLongest, 0xff), Bytes(kLongest, 0x80)};
  for (const int step : {1, 7, 59}) {
    Bytes& counting = inputs.emplace_back(kLongest / 2);
    for (std::size_t i = 0; i < counting.size(); ++i) counting[i] = static_cast<std::uint8_t>(i * step);
  }
  return inputs;
}

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : engine_(seed), pool_(fixed_inputs()) {}

  Bytes next() {
    if (next_fixed_ < pool_.size()) return pool_[next_fixed_++];
    Bytes bytes = below(4) == 0 ? Bytes(below(kLongest), 0) : pool_[below(pool_.size())];
    if (below(4) == 0) {
      for (std::uint8_t& byte : bytes) byte = random_byte();
    }
    for (std::size_t edits = 1 + below(8); edits > 0; --edits) edit(bytes);
    bytes.resize(std::min(bytes.size(), kLongest));
    if (pool_.size() < 64) {
      pool_.push_back(bytes);
      next_fixed_ = pool_.size();
    } else {
      pool_[below(pool_.size())] = bytes;
    }
    return bytes;
  }

 private:
  std::size_t below(std::size_t count) { return engine_() % std::max<std::size_t>(count, 1); }
  std::uint8_t random_byte() { return static_cast<std::uint8_t>(engine_()); }

  void edit(Bytes& bytes) {
    const std::size_t at = below(bytes.size());
    switch (bytes.empty() ? 0 : below(6)) {
      case 0:
        for (std::size_t more = below(32); more > 0; --more) bytes.push_back(random_byte());
        break;
      case 1:
        bytes[at] ^= static_cast<std::uint8_t>(1u << below(8));
        break;
      case 2:
        bytes[at] = random_byte();
        break;
      case 3:
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), random_byte());
        break;
      case 4:
        bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(at));
        break;
      default: {
        const std::size_t length = std::min(below(16), bytes.size() - at);
        std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(below(bytes.size() - length + 1)), length,
                    bytes.begin() + static_cast<std::ptrdiff_t>(at));
      }
    }
  }

  std::mt19937_64 engine_;
  std::vector<Bytes> pool_;
  std::size_t next_fixed_ = 0;
};

void run_files(int count, char** names) {
  for (int i = 0; i < count; ++i) {
    std::ifstream file(names[i], std::ios::binary);
    require(file.good(), std::string("cannot read ") + names[i]);
    const Bytes bytes{std::istreambuf_iterator<char>(file), {}};
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("ran %d files\n", count);
}

void run_random(const std::string& name, long runs, std::uint64_t seed) {
  const std::string path = name + ".input";
  const int file = open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0644);
  require(file >= 0, "cannot write " + path);
  const auto begin = std::chrono::steady_clock::now();
  Mutator mutator(seed);
  for (long run = 0; run < runs; ++run) {
    const Bytes bytes = mutator.next();
    const auto size = static_cast<ssize_t>(bytes.size());
    require(pwrite(file, bytes.data(), bytes.size(), 0) == size && ftruncate(file, size) == 0,
            "cannot write " + path);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  close(file);
  unlink(path.c_str());
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::printf("%s: %ld inputs in %.1f s\n", name.c_str(), runs, seconds.count());
}

}  // namespace
}  // namespace flash_dmattn::testing

int main(int argc, char** argv) {
  using namespace flash_dmattn::testing;
  const std::string program = argv[0];
  char* end = nullptr;
  const long runs = argc > 1 ? std::strtol(argv[1], &end, 10) : 0;
  if (argc > 1 && *end == '\0') {
    run_random(program.substr(program.rfind('/') + 1), runs,
               argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  } else {
    run_files(argc - 1, argv + 1);
  }
}
