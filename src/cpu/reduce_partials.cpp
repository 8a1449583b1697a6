#include "cpu/reduce_partials.h"

#include <algorithm>

#include "core/parallel.h"
#include "cpu/bugs.h"
#include "cpu/rows.h"

namespace flash_dmattn::cpu {
namespace {

constexpr std::int64_t kChunk = 1024;  // keys of a task

// A run of keys of one head.
struct Chunk {
  Sequence sequence;
  std::int64_t sequence_index, head, head_index;
  std::int64_t key_begin, key_end;
};

// Calls task(chunk) for every chunk of the heads [head_begin, head_end).
template <class Task>
void for_each_chunk(const BackwardProblem& problem, std::int64_t head_begin, std::int64_t head_end,
                    const ParallelFor& parallel_for, const Task& task) {
  const std::int64_t chunks_per_head = (problem.layout.max_seqlen_k + kChunk - 1) / kChunk;
  for_each_task(parallel_for, (head_end - head_begin) * chunks_per_head,
                [&](std::int64_t index, int /*worker*/) {
                  Chunk chunk;
                  chunk.head_index = head_begin + index / chunks_per_head;
                  chunk.sequence_index = chunk.head_index / problem.layout.heads_kv;
                  chunk.head = chunk.head_index % problem.layout.heads_kv;
                  chunk.sequence = problem.layout.sequence(chunk.sequence_index);
                  chunk.key_begin = std::min(index % chunks_per_head * kChunk, chunk.sequence.seqlen_k);
                  chunk.key_end = std::min(chunk.key_begin + kChunk, chunk.sequence.seqlen_k);
                  task(chunk);
                });
}

// Rows of one head's sums: in `sum` if there is one, otherwise in the gradient itself.
template <class T>
MatrixView<T> sums_of(const BackwardProblem& problem, const Chunk& chunk, void* sum,
                      const TensorView& gradient) {
  if (sum == nullptr) return problem.layout.k_rows<T>(gradient, chunk.sequence, chunk.head);
  const Layout& layout = problem.layout;
  const std::int64_t width = problem.tile_shape.head_dim_padded;
  const std::int64_t first_key =
      layout.packed ? chunk.sequence.begin_k : chunk.sequence_index * layout.max_seqlen_k;
  return {static_cast<T*>(sum) + (first_key * layout.heads_kv + chunk.head) * width, layout.heads_kv * width,
          1};
}

template <class T>
struct KeySums {
  MatrixView<T> dk, dv;
  VectorView<T> dbias;

  KeySums(const BackwardProblem& problem, const Chunk& chunk)
      : dk(sums_of<T>(problem, chunk, problem.dk_sum, problem.args.dk)),
        dv(sums_of<T>(problem, chunk, problem.dv_sum, problem.args.dv)),
        dbias(key_only<T>(problem.layout, problem.args.dbias, chunk.sequence, chunk.head)) {}
};

template <class T>
void add_row(const BackwardProblem& problem, const KeySums<T>& sums, std::int64_t key, const T* partial,
             T dbias) {
  const std::int64_t head_dim = problem.layout.head_dim;
  if (sums.dk.present()) {
    const T scale = static_cast<T>(problem.args.scale * (injected(Bug::kDkScaleOff) ? 1.01 : 1.0));
    T* dk = sums.dk.row(key);
    for (std::int64_t k = 0; k < head_dim; ++k) dk[k] += scale * partial[k];
  }
  if (sums.dv.present()) {
    const T* partial_dv = partial + problem.partial_shape.dk_width;
    T* dv = sums.dv.row(key);
    for (std::int64_t k = 0; k < head_dim; ++k) dv[k] += partial_dv[k];
  }
  if (sums.dbias.present()) sums.dbias[key] += dbias;
}

// Adds what one segment found for the keys of a chunk.
template <class T>
void add_segment(const BackwardProblem& problem, const SegmentItem& item, const Chunk& chunk,
                 const KeySums<T>& sums) {
  const Segment& segment = *item.segment;
  const PlanEntry* entries = problem.plans[item.head_index].entries;
  const T* partial = static_cast<const T*>(problem.partial) + item.partial_begin;
  const T* dbias = partial + (segment.list_end - segment.list_begin) * problem.partial_shape.width();
  const auto add = [&](std::int64_t place, std::int64_t key) {
    const T key_dbias = sums.dbias.present() ? dbias[place] : T(0);
    add_row(problem, sums, key, partial + place * problem.partial_shape.width(), key_dbias);
    if (injected(Bug::kSegmentCountedTwice) && place == 0) {
      add_row(problem, sums, key, partial + place * problem.partial_shape.width(), T(0));
    }
  };
  if (entries == nullptr) {
    const std::int64_t end = std::min(chunk.key_end, segment.list_end);
    for (std::int64_t key = chunk.key_begin; key < end; ++key) add(key, key);
    return;
  }
  const PlanEntry* begin = entries + segment.list_begin;
  const PlanEntry* end = entries + segment.list_end;
  const auto before = [](const PlanEntry& entry, std::int64_t key) { return entry.key < key; };
  for (const PlanEntry* it = std::lower_bound(begin, end, chunk.key_begin, before);
       it != end && it->key < chunk.key_end; ++it) {
    add(it - begin, it->key);
  }
}

}  // namespace

template <class T>
void clear_key_sums(const BackwardProblem& problem, const ParallelFor& parallel_for) {
  for_each_chunk(problem, 0, problem.plans.num_heads(), parallel_for, [&](const Chunk& chunk) {
    const KeySums<T> sums(problem, chunk);
    for (std::int64_t key = chunk.key_begin; key < chunk.key_end; ++key) {
      if (sums.dk.present()) std::fill_n(sums.dk.row(key), problem.layout.head_dim, T(0));
      if (sums.dv.present()) std::fill_n(sums.dv.row(key), problem.layout.head_dim, T(0));
      if (sums.dbias.present()) sums.dbias[key] = 0;
    }
  });
}

template <class T>
void add_partials(const BackwardProblem& problem, std::int64_t num_items, const ParallelFor& parallel_for) {
  if (num_items == 0) return;
  const SegmentItem* begin = problem.items;
  const SegmentItem* end = begin + num_items;
  for_each_chunk(problem, begin->head_index, end[-1].head_index + 1, parallel_for, [&](const Chunk& chunk) {
    const KeySums<T> sums(problem, chunk);
    const auto before = [](const SegmentItem& item, std::int64_t head_index) {
      return item.head_index < head_index;
    };
    for (const SegmentItem* item = std::lower_bound(begin, end, chunk.head_index, before);
         item != end && item->head_index == chunk.head_index; ++item) {
      add_segment(problem, *item, chunk, sums);
    }
  });
}

template <class T>
void store_key_sums(const BackwardProblem& problem, const ParallelFor& parallel_for) {
  if (problem.dk_sum == nullptr && problem.dv_sum == nullptr) return;
  for_each_chunk(problem, 0, problem.plans.num_heads(), parallel_for, [&](const Chunk& chunk) {
    const auto store = [&](void* sum, const TensorView& gradient) {
      if (sum == nullptr) return;
      const MatrixView<T> sums = sums_of<T>(problem, chunk, sum, gradient);
      const Rows rows = key_rows(problem.layout, gradient, chunk.sequence, chunk.head);
      for (std::int64_t key = chunk.key_begin; key < chunk.key_end; ++key) {
        for (std::int64_t k = 0; k < problem.layout.head_dim; ++k) {
          store_element(sums.row(key)[k], rows.dtype, rows.row(key) + k * rows.column_bytes);
        }
      }
    };
    store(problem.dk_sum, problem.args.dk);
    store(problem.dv_sum, problem.args.dv);
  });
}

template void clear_key_sums<float>(const BackwardProblem&, const ParallelFor&);
template void clear_key_sums<double>(const BackwardProblem&, const ParallelFor&);
template void add_partials<float>(const BackwardProblem&, std::int64_t, const ParallelFor&);
template void add_partials<double>(const BackwardProblem&, std::int64_t, const ParallelFor&);
template void store_key_sums<float>(const BackwardProblem&, const ParallelFor&);
template void store_key_sums<double>(const BackwardProblem&, const ParallelFor&);

}  // namespace flash_dmattn::cpu
