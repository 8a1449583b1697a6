// The pass over the scores is vector code: where no key of a vector reaches the threshold, as in most, it
// costs one comparison. Only keys that reach it are ranked.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/candidates.cpp"
#include "cpu/targets.h"

#include <hwy/foreach_target.h>  // must come before highway.h

#include <hwy/highway.h>

#include <algorithm>
#include <new>

#include "cpu/candidates.h"
#include "cpu/rows.h"
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flash_dmattn::cpu::HWY_NAMESPACE {

inline constexpr int kStepKeys = 512;  // keys that are widened at a time

// The scores [begin, begin + count), in place if possible, otherwise in `buffer`.
template <class T>
const T* read_scores(Rows row, std::int64_t begin, std::int64_t count, T* HWY_RESTRICT buffer) {
  row.data += begin * row.column_bytes;
  return read_row(row, 0, static_cast<std::size_t>(count), buffer);
}

// expiry[key] = key
inline void write_unselected(VectorView<std::int32_t> expiry, std::int64_t begin, std::int64_t end) {
  std::int64_t key = begin;
  if (expiry.stride == 1) {
    constexpr Tag<std::int32_t> d;
    auto keys = hn::Iota(d, static_cast<std::int32_t>(begin));
    for (; key + kLanes<std::int32_t> <= end; key += kLanes<std::int32_t>) {
      hn::StoreU(keys, d, expiry.data + key);
      keys = hn::Add(keys, hn::Set(d, kLanes<std::int32_t>));
    }
  }
  for (; key < end; ++key) expiry[key] = static_cast<std::int32_t>(key);
}

// Collects the keys [begin, begin + count) of these scores that reach the threshold; returns their number.
template <class T>
int reach_threshold(const CandidateHead<T>& head, const T* HWY_RESTRICT scores, std::int64_t begin, int count,
                    RankOf<T>* HWY_RESTRICT reached) {
  constexpr Tag<T> d;
  const Vec<T> threshold = hn::Set(d, head.threshold_score);
  int num_reached = 0;
  const auto test = [&](int i) {
    const auto bits = ordered_bits(scores[i]);
    const RankOf<T> rank(bits, static_cast<std::uint32_t>(begin + i) ^ tie_order());
    reached[num_reached] = rank;
    num_reached += bits != 0 && !(rank < head.threshold) ? 1 : 0;
  };
  int i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    if (hn::AllFalse(d, hn::Ge(hn::LoadU(d, scores + i), threshold))) continue;
    for (int lane = 0; lane < kLanes<T>; ++lane) test(i + lane);
  }
  for (; i < count; ++i) test(i);
  return num_reached;
}

// The sinks and the local window, on top of what write_unselected wrote.
template <class T>
void write_edits(const ExpiryWriter& writer, const Rows& row, std::int64_t begin, std::int64_t end) {
  const auto edit = [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t key = from; key < to; ++key) {
      const T score = load_element<T>(row.data + key * row.column_bytes, row.dtype);
      if (ordered_bits(score) != 0) writer.dropped(key, key);
    }
  };
  edit(begin, std::min(end, writer.num_sinks));
  if (writer.local_window > 0) edit(std::max(begin, writer.first_position - writer.local_window), end);
}

template <class T>
void collect_task(const CandidateSearch<T>& search, std::int64_t task) {
  const std::int64_t head_index = task / search.tasks_per_head();
  CandidateHead<T>& head = search.heads[head_index];
  const Rows row = search.scores(head_index);
  const ExpiryWriter writer = search.writer(head_index);
  const std::int64_t task_begin = task % search.tasks_per_head() * kCollectKeys;
  const std::int64_t task_end = std::min(task_begin + kCollectKeys, search.shape.num_keys);
  for (std::int64_t begin = task_begin; begin < task_end; begin += kStepKeys) {
    const std::int64_t count = std::min<std::int64_t>(kStepKeys, task_end - begin);
    alignas(64) T buffer[kStepKeys];
    RankOf<T> reached[kStepKeys + 1];
    const T* scores = read_scores(row, begin, count, buffer);
    const int num_reached = reach_threshold(head, scores, begin, static_cast<int>(count), reached);
    write_unselected(writer.expiry, begin, begin + count);
    if (num_reached == 0) continue;
    const std::int64_t place = head.count.fetch_add(num_reached, std::memory_order_relaxed);
    const std::int64_t room = std::max<std::int64_t>(search.shape.capacity - place, 0);
    std::copy_n(reached, std::min<std::int64_t>(num_reached, room),
                search.ranks + head_index * search.shape.memory() + place);
  }
  if (writer.num_sinks > 0 || writer.local_window > 0) write_edits<T>(writer, row, task_begin, task_end);
}

void collect_float(const CandidateSearch<float>& search, std::int64_t task) { collect_task(search, task); }
void collect_double(const CandidateSearch<double>& search, std::int64_t task) { collect_task(search, task); }

}  // namespace flash_dmattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_dmattn::cpu {

HWY_EXPORT(collect_float);
HWY_EXPORT(collect_double);

template <class T>
void sample_head(const CandidateSearch<T>& search, std::int64_t head_index) {
  const CandidateShape& shape = search.shape;
  const Rows row = search.scores(head_index);
  RankOf<T>* sample = search.ranks + head_index * shape.memory();
  for (std::int64_t cell = 0; cell < shape.sample_size; ++cell) {
    // A place in the cell that follows no period of the scores: the golden ratio's multiples, mixed.
    const std::uint64_t mixed = static_cast<std::uint64_t>(cell) * 0x9e3779b97f4a7c15u;
    const std::int64_t within = static_cast<std::int64_t>((mixed ^ mixed >> 29) >> 32) % kSampleCell;
    const std::int64_t key = std::min(cell * kSampleCell + within, shape.num_keys - 1);
    const T score = load_element<T>(row.data + key * row.column_bytes, row.dtype);
    const auto bits = ordered_bits(score);
    sample[cell] =
        bits == 0 ? RankOf<T>(0, 0) : RankOf<T>(bits, static_cast<std::uint32_t>(key) ^ tie_order());
  }
  CandidateHead<T>& head = *new (search.heads + head_index) CandidateHead<T>;
  if (shape.sample_rank > shape.sample_size) return;
  RankOf<T>* place = sample + shape.sample_rank - 1;
  std::nth_element(sample, place, sample + shape.sample_size,
                   [](const RankOf<T>& a, const RankOf<T>& b) { return b < a; });
  if (!(RankOf<T>(0, 0) < *place)) return;
  head.threshold = *place;
  const std::int64_t key = place->index() ^ tie_order();
  head.threshold_score = load_element<T>(row.data + key * row.column_bytes, row.dtype);
}

template <>
void collect<float>(const CandidateSearch<float>& search, std::int64_t task) {
  HWY_DYNAMIC_DISPATCH(collect_float)(search, task);
}
template <>
void collect<double>(const CandidateSearch<double>& search, std::int64_t task) {
  HWY_DYNAMIC_DISPATCH(collect_double)(search, task);
}

template void sample_head(const CandidateSearch<float>&, std::int64_t);
template void sample_head(const CandidateSearch<double>&, std::int64_t);

}  // namespace flash_dmattn::cpu
#endif  // HWY_ONCE
