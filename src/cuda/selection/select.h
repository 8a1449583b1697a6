// How a selection runs on the GPU.
//
// clang-format off
//   everything fits the window    convert_scores
//   causal, at most one chunk     finish_chunks
//   causal                        (convert_scores,) [select_in_supers, merge_supers,] find_thresholds,
//                                 find_death_chunks, finish_chunks
//   only what is kept at the end  convert_scores, [select_in_supers,] keep_best
//   few rows, long sequence       sample_scores, split_keys
// clang-format on
//
// The kernels in brackets run where a sequence may be longer than a super-chunk. Float32 scores side by side
// that need none of these are read as they are.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "flash_dmattn/attention.h"

namespace flash_dmattn::cuda {

// The pieces that the kernels cut sequences into. They change no result.
struct SelectSizes {
  int chunk = 0;        // 32, 256, 512 or 1024
  int super_chunk = 0;  // a multiple of chunk; raised where keep_window needs it
};

SelectSizes choose_select_sizes(const SelectArgs& args);

std::size_t select_workspace_bytes(const SelectArgs& args, const SelectSizes& sizes);
cudaError_t select(const SelectArgs& args, const SelectSizes& sizes, const Workspace& workspace,
                   cudaStream_t stream);

}  // namespace flash_dmattn::cuda
