// Attention of few rows over many keys: decode. The keys that some row sees are listed, then split over the
// whole GPU, so many to a split whatever the batch, and the splits' results are added in the order of the
// splits by the CTA that finishes last.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/workspace.h"
#include "cuda/common/geometry.cuh"
#include "cuda/common/plan.cuh"
#include "flash_dmattn/attention.h"

namespace flash_dmattn::cuda::sm80 {

constexpr int kDecodeMaxRows = 16;         // of the sequence
constexpr int kDecodeTileM = 16;           // rows times heads of a CTA
constexpr int kDecodeMaxSplits = 512;      // of a head
constexpr int kDecodeLeastSplit = 128;     // keys
constexpr int kDecodeUnknownSplits = 128;  // at most, where the list decides how long they are
constexpr int kDecodeListTile = 8192;      // keys that one CTA looks through
constexpr int kDecodeMaxLists = 1024;      // such CTAs of a head, at most
constexpr int kDecodeMinKeys = 512;        // fewer are one or two tiles for the other kernel

struct DecodeSizes {
  int lists = 0;       // of a head; 0: every key counts, and none is listed
  int split_keys = 0;  // keys of a split; the last takes what is left. 0: the list decides
  int splits = 0;      // of a head, at most
  int tiles_m = 0;     // of kDecodeTileM rows times heads
};

struct DecodeBuffers {
  DecodeSizes sizes;
  // [sequences * heads_kv] of each.
  PlanEntry* entries = nullptr;  // [..][seqlen_k]: those of list n from n * kDecodeListTile on
  int* counts = nullptr;         // [..][lists]
  unsigned* finished = nullptr;  // [..][tiles_m]: splits that are done
  float* partials = nullptr;     // [..][tiles_m][splits][kDecodeTileM][head dim of the instance]
  float2* stats = nullptr;       // [..][tiles_m][splits][kDecodeTileM]: maximum (times log2(e)) and sum
};

std::string decode_why_not(const ForwardArgs& args, int device);
DecodeBuffers cut_decode(Arena& arena, const ForwardArgs& args, int device);
cudaError_t decode(const ForwardArgs& args, const DecodeBuffers& buffers, int device, cudaStream_t stream);

}  // namespace flash_dmattn::cuda::sm80
