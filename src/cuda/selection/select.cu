#include "cuda/selection/select.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "core/dtype.h"
#include "core/workspace.h"
#include "cuda/backend.h"
#include "cuda/common/arguments.h"
#include "cuda/common/launch.h"
#include "cuda/selection/select_chunk.cuh"
#include "cuda/selection/select_few.cuh"
#include "cuda/selection/select_kernels.cuh"
#include "cuda/selection/select_problem.cuh"

namespace flash_dmattn::cuda {
namespace {

constexpr int kAll = std::numeric_limits<int>::max();
constexpr int kMaxChunk = 1024;
constexpr int kMinSuperChunk = 4096;
constexpr int kMaxSuperChunk = 32768;  // sequences up to this length need no lists
constexpr int kMinFewKeys = 256;       // for few rows over fewer keys the other ways are as good

enum class Path { kKeepAll, kOneChunk, kChunks, kKeepBest, kFewRows };

int clamp_to_int(std::int64_t value) { return static_cast<int>(std::min<std::int64_t>(value, kAll)); }

int round_up(std::int64_t value, int unit) {
  return clamp_to_int(ceil_div(clamp_to_int(value), unit) * unit);
}

Geometry make_geometry(const SelectArgs& args) {
  Geometry geometry;
  geometry.cu_seqlens_k = cu_seqlens_data(args.cu_seqlens);
  const bool packed = geometry.packed();
  geometry.num_sequences = static_cast<int>(packed ? args.cu_seqlens.shape[0] - 1 : args.score.shape[0]);
  geometry.seqlen_k = static_cast<int>(args.score.shape[packed ? 0 : 2]);
  geometry.heads_kv = static_cast<int>(args.score.shape[1]);
  return geometry;
}

// An upper bound, if packed.
int longest_sequence(const SelectArgs& args) { return make_geometry(args).seqlen_k; }

// Rows whose exact expiry is to be found: few, or all.
int tail_rows(const SelectArgs& args) {
  if (!args.causal || args.num_queries == 1) return 0;  // one row sees what is kept at the end
  const bool few = args.num_queries >= 0 && args.num_queries <= longest_sequence(args) / 2;
  return few ? static_cast<int>(args.num_queries) : kAll;
}

Path path_of(const SelectArgs& args, const SelectSizes& sizes) {
  const int longest = longest_sequence(args);
  if (args.keep_window >= longest || args.num_queries == 0) return Path::kKeepAll;
  const int tail = tail_rows(args);
  if (tail <= kMaxFewRows && longest > kMinFewKeys && !args.cu_seqlens.present()) return Path::kFewRows;
  if (tail == 0) return Path::kKeepBest;
  return tail == kAll && longest <= sizes.chunk ? Path::kOneChunk : Path::kChunks;
}

SelectCut make_cut(const SelectArgs& args, const SelectSizes& sizes, Path path) {
  SelectCut cut;
  cut.chunk = sizes.chunk;
  cut.tail = path == Path::kKeepAll ? 0 : tail_rows(args);
  // Lists of keep_window keys per super-chunk are few and short enough if it is as long; and one super-chunk
  // needs no lists at all.
  const int least = round_up(std::max<std::int64_t>(args.keep_window, sizes.super_chunk), sizes.chunk);
  const int longest = std::max(longest_sequence(args), 1);
  const bool several = least <= longest / 2 || sizes.super_chunk >= args.keep_window;
  cut.super_chunk = several ? least : std::max(least, round_up(longest, sizes.chunk));
  return cut;
}

// The pieces of kernels that look at all keys: about as many as CTAs find room at a time, for each begins and
// ends with a whole histogram.
Numbering few_tiles(const Geometry& geometry, std::int64_t ctas) {
  const std::int64_t keys = geometry.total_k() * geometry.heads_kv;
  const std::int64_t longest = round_up(geometry.seqlen_k, kFewTile);
  const auto tile = static_cast<int>(std::min(ceil_div(keys, ctas * kFewTile) * kFewTile, longest));
  return {tile, 0, static_cast<int>(ceil_div(geometry.seqlen_k, tile))};
}

void number_pieces(SelectProblem& problem) {
  const int seqlen = problem.geometry.seqlen_k;
  const SelectCut& cut = problem.cut;
  const bool packed = problem.geometry.packed();
  const int chunks = packed ? 0 : cut.chunks(seqlen);
  const int supers = packed ? 0 : cut.supers(seqlen);
  const bool has_prefix = !packed && cut.prefix(seqlen) > 0;
  const auto survivor_pieces = has_prefix ? static_cast<int>(ceil_div(problem.keep_window, cut.chunk)) : 0;
  problem.tiles = {kConvertTile, 1, static_cast<int>(ceil_div(seqlen, kConvertTile))};
  problem.supers = {std::max(cut.super_chunk / 2, 1), 0, supers};
  problem.boundaries = {cut.chunk, 2, chunks + 1};
  problem.deaths = {cut.chunk, 1, chunks + survivor_pieces};
  problem.chunks = {cut.chunk, 1, chunks};
}

// Cuts the arrays that the kernels of the path need.
void cut_arrays(Arena& arena, SelectProblem& problem, Path path) {
  if (path == Path::kKeepAll || path == Path::kOneChunk || path == Path::kFewRows) return;
  const Geometry& geometry = problem.geometry;
  const auto heads = static_cast<std::size_t>(geometry.heads_kv);
  const bool several_supers = geometry.packed() ? problem.cut.super_chunk < geometry.seqlen_k
                                                : problem.cut.supers(geometry.seqlen_k) > 1;
  const bool reads_scores = path == Path::kChunks && !several_supers && problem.cut.tail == kAll &&
                            problem.score_dtype == DType::kFloat32 && problem.score_stride == 1;
  if (!reads_scores) problem.bits = arena.take<unsigned>(heads * geometry.total_k());
  if (several_supers) {
    const std::size_t places = heads * problem.supers.count(geometry) * problem.keep_window;
    problem.local_bits = arena.take<unsigned>(places);
    problem.local_keys = arena.take<int>(places);
    if (path == Path::kChunks) {
      problem.survivor_bits = arena.take<unsigned>(places);
      problem.survivor_keys = arena.take<int>(places);
      problem.entrant_bits = arena.take<unsigned>(heads * geometry.total_k());
      problem.entrant_keys = arena.take<int>(heads * geometry.total_k());
      problem.num_entrants = arena.take<int>(heads * problem.supers.count(geometry));
    }
  }
  if (path == Path::kKeepBest) return;
  const std::size_t boundaries = heads * problem.boundaries.count(geometry);
  problem.thresholds = arena.take<Rank>(boundaries);
  problem.num_alive = arena.take<int>(boundaries);
  problem.num_old = arena.take<int>(boundaries);
  problem.old_entries =
      geometry.packed() ? geometry.total_k() : problem.chunks.count(geometry) * problem.cut.chunk;
  problem.old = arena.take<int>(heads * problem.old_entries);
}

SelectProblem make_problem(const SelectArgs& args, const SelectSizes& sizes, Path path, Arena& arena) {
  SelectProblem problem;
  problem.geometry = make_geometry(args);
  const bool packed = problem.geometry.packed();
  const auto& stride = args.score.stride;
  problem.score_dtype = args.score.dtype;
  problem.score = args.score.data;
  problem.score_batch_stride = packed ? 0 : stride[0];
  problem.score_head_stride = stride[1];
  problem.score_stride = packed ? stride[0] : stride[2];
  problem.expiry = key_tensor<int>(args.expiry);
  problem.keep_window = clamp_to_int(args.keep_window);
  problem.num_sinks = clamp_to_int(args.num_sinks);
  problem.local_window = clamp_to_int(args.local_window);
  problem.num_queries = args.num_queries < 0 ? kAll : clamp_to_int(args.num_queries);
  problem.keep_all = path == Path::kKeepAll;
  problem.cut = make_cut(args, sizes, path);
  number_pieces(problem);
  cut_arrays(arena, problem, path);
  return problem;
}

// What the kernels for few rows count in, zeroed, and their candidates.
struct FewMemory {
  unsigned* counters;
  std::size_t num_counters;
  Rank* candidates;

  FewMemory(Arena& arena, const Geometry& geometry) {
    const auto lines = static_cast<std::size_t>(geometry.num_sequences) * geometry.heads_kv;
    num_counters = lines * (kDigitBins + 2);
    counters = arena.take<unsigned>(num_counters);
    candidates = arena.take<Rank>(lines * geometry.seqlen_k);
  }
};

cudaError_t select_few(const SelectProblem& select, const FewMemory& memory, cudaStream_t stream) {
  const Geometry& geometry = select.geometry;
  const std::size_t lines = memory.num_counters / (kDigitBins + 2);
  FewProblem problem{select, {}};
  problem.state.histogram = memory.counters;
  problem.state.num_candidates = memory.counters + lines * kDigitBins;
  problem.state.num_finished = problem.state.num_candidates + lines;
  problem.state.candidates = memory.candidates;
  cudaError_t status = cudaMemsetAsync(memory.counters, 0, memory.num_counters * sizeof(unsigned), stream);
  const auto then = [&](void (*kernel)(FewProblem), std::int64_t ctas) {
    problem.select.tiles = few_tiles(geometry, ctas);
    const std::int64_t grid = problem.select.tiles.count(geometry) * geometry.heads_kv;
    if (status == cudaSuccess) {
      status = launch(kernel, {static_cast<unsigned>(grid), kFewThreads, 0, stream}, problem);
    }
  };
  then(count_digits, 528);
  then(split_keys, 264);
  return status;
}

using Kernel = void (*)(SelectProblem);

// Queues kernels one after the other and keeps the first error.
class Queue {
 public:
  Queue(const SelectProblem& problem, cudaStream_t stream) : problem_(problem), stream_(stream) {}

  // A CTA for each of `pieces` pieces of every head.
  void run(Kernel kernel, std::int64_t pieces, int threads) {
    if (status_ != cudaSuccess) return;
    const auto grid = static_cast<unsigned>(pieces * problem_.geometry.heads_kv);
    status_ = launch(kernel, {grid, static_cast<unsigned>(threads), 0, stream_, follows_}, problem_);
    follows_ = true;
  }
  void run(Kernel kernel, const Numbering& numbering, int threads) {
    run(kernel, numbering.count(problem_.geometry), threads);
  }

  cudaError_t status() const { return status_; }

 private:
  const SelectProblem& problem_;
  cudaStream_t stream_;
  cudaError_t status_ = cudaSuccess;
  bool follows_ = false;  // a kernel of this call
};

Kernel finish_kernel(int chunk) {
  switch (chunk) {
    case 32:
      return finish_chunks<32>;
    case 256:
      return finish_chunks<256>;
    case 512:
      return finish_chunks<512>;
    default:
      return finish_chunks<1024>;
  }
}

}  // namespace

SelectSizes choose_select_sizes(const SelectArgs& args) {
  const Geometry geometry = make_geometry(args);
  const std::int64_t longest = geometry.seqlen_k;
  const int tail = tail_rows(args);
  const std::int64_t rows = tail == kAll ? geometry.total_k() : std::int64_t{tail} * geometry.num_sequences;
  // Short chunks give short calls a CTA for every SM, long ones spare boundaries.
  const std::int64_t keys_of_heads = rows * geometry.heads_kv;
  SelectSizes sizes;
  if (longest <= 32) {
    sizes.chunk = 32;
  } else if (longest <= 256 || (longest > kMaxChunk && keys_of_heads <= 64 * kMaxChunk)) {
    sizes.chunk = 256;
  } else if (longest > kMaxChunk && keys_of_heads <= 128 * kMaxChunk) {
    sizes.chunk = 512;
  } else {
    sizes.chunk = kMaxChunk;
  }
  sizes.super_chunk = kMaxSuperChunk;
  if (longest > kMaxSuperChunk) {
    const double keys = static_cast<double>(longest);
    const double window = static_cast<double>(args.keep_window);
    // Merging reads w (N / S)^2 / 2 keys of a head, the boundaries of the first super-chunk S^2 / (2 C).
    // Before a short tail one CTA reads w keys of each super-chunk: as many as another reads in a
    // super-chunk.
    const double best = std::sqrt(keys * (tail == kAll ? std::sqrt(window * sizes.chunk) : window));
    const std::uint64_t power = std::bit_floor(static_cast<std::uint64_t>(best));
    sizes.super_chunk = static_cast<int>(std::clamp<std::uint64_t>(power, kMinSuperChunk, kMaxSuperChunk));
  }
  return sizes;
}

std::size_t select_workspace_bytes(const SelectArgs& args, const SelectSizes& sizes) {
  Arena arena;
  const Path path = path_of(args, sizes);
  const SelectProblem problem = make_problem(args, sizes, path, arena);
  if (path == Path::kFewRows) FewMemory(arena, problem.geometry);
  return arena.bytes();
}

cudaError_t select(const SelectArgs& args, const SelectSizes& sizes, const Workspace& workspace,
                   cudaStream_t stream) {
  if (args.score.num_elements() == 0 || make_geometry(args).num_sequences == 0) return cudaSuccess;
  const Path path = path_of(args, sizes);
  Arena arena(workspace);
  const SelectProblem problem = make_problem(args, sizes, path, arena);
  if (path == Path::kFewRows) return select_few(problem, FewMemory(arena, problem.geometry), stream);
  Queue queue(problem, stream);
  const Kernel finish = finish_kernel(sizes.chunk);
  const bool has_lists = problem.local_bits != nullptr;
  if (path == Path::kOneChunk) {
    queue.run(finish, problem.chunks, sizes.chunk);
    return queue.status();
  }
  if (path == Path::kKeepAll || problem.bits != nullptr) {
    queue.run(convert_scores, problem.tiles, kConvertThreads);
  }
  if (path == Path::kKeepAll) return queue.status();
  if (has_lists) queue.run(select_in_supers, problem.supers, kSelectThreads);
  if (path == Path::kKeepBest) {
    queue.run(keep_best, problem.geometry.num_sequences, kSelectThreads);
    return queue.status();
  }
  if (has_lists) queue.run(merge_supers, problem.supers, kSelectThreads);
  queue.run(find_thresholds, problem.boundaries, kSelectThreads);
  queue.run(find_death_chunks, problem.deaths, std::min(sizes.chunk, kDeathThreads));
  queue.run(finish, problem.chunks, sizes.chunk);
  return queue.status();
}

std::string select_why_not(const SelectArgs& args, const Target& target) {
  const std::string reason = device_why_not(target);
  if (!reason.empty()) return reason;
  if (args.score.dtype == DType::kFloat64) {
    return "takes float32, bfloat16 and float16 scores, not float64";
  }
  // Tiles, chunks and boundaries number at most length / 32 + 2 per sequence and head.
  const Geometry geometry = make_geometry(args);
  const double pieces = static_cast<double>(geometry.total_k()) / 32 + 2.0 * geometry.num_sequences;
  if (pieces * geometry.heads_kv > kAll) return "takes fewer than 2^30 sequences times heads";
  return "";
}

std::size_t select_workspace_bytes(const SelectArgs& args, const Target& /*target*/) {
  return select_workspace_bytes(args, choose_select_sizes(args));
}

Status select(const SelectArgs& args, const Target& target, const Workspace& workspace) {
  const DeviceGuard guard(target.device_index);
  cudaError_t status = guard.status();
  if (status == cudaSuccess) {
    status = select(args, choose_select_sizes(args), workspace, static_cast<cudaStream_t>(target.stream));
  }
  return device_status("select", status);
}

}  // namespace flash_dmattn::cuda
