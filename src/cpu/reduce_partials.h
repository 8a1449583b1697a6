// The sums of the keys: dk, dv and dbias of a call, to which segments contribute one after the other.
#pragma once

#include <cstdint>

#include "cpu/backward.h"
#include "flash_dmattn/target.h"

namespace flash_dmattn::cpu {

// T is the arithmetic type.
template <class T>
void clear_key_sums(const BackwardProblem& problem, const ParallelFor& parallel_for);

// Adds the partial sums of one wave, in the order of its items, which are sorted by head and segment.
template <class T>
void add_partials(const BackwardProblem& problem, std::int64_t num_items, const ParallelFor& parallel_for);

// Writes dk and dv where they were not summed in place.
template <class T>
void store_key_sums(const BackwardProblem& problem, const ParallelFor& parallel_for);

}  // namespace flash_dmattn::cpu
