// Dynamic-mask attention: every query attends to the keep_window keys of highest score before it, exactly.
//
//   select: scores to expiry, the whole mask as one int32 per key: key j is visible to [j, expiry_j).
//
//   plan: expiry to the key lists, or mask and dense bias to the bits, that the CUDA kernels read. Forward
//   and backward make their own if given none.
//
//   forward: query, key, value, bias, expiry to out and lse.
//
//   backward: the gradients of query, key, value and bias.
//
// The definition of every result, with the proof that one integer per key is enough, is docs/math.md.
//
// Shapes: B batch, Sq and Sk the lengths of queries and keys, H and Hkv the numbers of query and key/value
// heads (H % Hkv == 0, query head h reads key/value head h / (H / Hkv)), D the head dim. Any strides. Query
// row i stands at position i + Sk - Sq. Packed sequences (cu_seqlens present) drop the batch axis: sequence s
// owns the rows [cu_seqlens[s], cu_seqlens[s + 1]), selects on its own, and counts positions from its own
// start.
//
// query, key, value, out and their gradients share one type: float64, float32, bfloat16 or float16. Key-only
// bias, lse and their gradients are float32, or float64 where the query is float64. Arithmetic is in that
// type.
//
// The library allocates nothing (but the message of an error), owns no thread and keeps no state between
// calls: any number of threads may call it at the same time. The same input gives the same bits, whatever the
// number of workers.
//
// On a CUDA device (Target) every tensor lies in its memory; rows of query, key, value, out and their
// gradients have a last axis of unit stride and start at multiples of 16 bytes; a call only queues work on
// the target's stream and never waits for it. Values of cu_seqlens and expiry cannot be checked there; wrong
// ones give wrong results, no access out of bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "flash_dmattn/status.h"
#include "flash_dmattn/target.h"
#include "flash_dmattn/tensor_view.h"

namespace flash_dmattn {

struct SelectArgs {
  // [B, Hkv, Sk], packed [total_k, Hkv]; float64 (not on CUDA), float32, bfloat16 or float16. -inf and NaN
  // disable a key: it is visible to nobody and takes no place in the window.
  TensorView score{};
  TensorView cu_seqlens{};  // int32 [sequences + 1], present for packed sequences only
  // Out, int32, shaped like score: the first position that no longer sees the key. Equal to the key's own
  // position: never visible; Sk: never evicted. Not causal: Sk if selected.
  TensorView expiry{};
  std::int64_t keep_window = 0;  // keys kept per query, >= 1; of equal scores the later key ranks higher
  bool causal = true;
  // The first num_sinks keys, unless disabled, stay visible for ever, on top of the window.
  std::int64_t num_sinks = 0;
  // Every key, unless disabled, is visible to this many positions at least, itself included, on top of the
  // window; causal only.
  std::int64_t local_window = 0;
  // The rows that will read expiry, the last ones; -1: all. Keys that none of them sees get their own
  // position, which spares most of the work when there are few. Causal, not packed.
  std::int64_t num_queries = -1;
};

// What the CUDA kernels read instead of what hides keys: key lists, or bits where there is a mask or a dense
// bias; docs/plan.md describes both. Forward and backward of one call may share one plan. At least one of
// expiry, bias and mask is present.
struct PlanArgs {
  TensorView expiry{};        // optional, as in ForwardArgs
  TensorView score{};         // optional, as in ForwardArgs
  TensorView bias{};          // optional, as in ForwardArgs
  TensorView cu_seqlens_q{};  // as in ForwardArgs
  TensorView cu_seqlens_k{};
  TensorView mask{};             // optional, as in ForwardArgs
  TensorView plan{};             // out, int32 [plan_elements(args, target)]
  std::int64_t num_queries = 0;  // Sq; ignored if packed
  std::int64_t keep_window = 0;  // as in ForwardArgs
  bool causal = true;
};

struct ForwardArgs {
  TensorView query{};  // [B, Sq, H, D], packed [total_q, H, D]
  TensorView key{};    // [B, Sk, Hkv, D], packed [total_k, Hkv, D]
  TensorView value{};  // like key

  // Optional, added to the logits. Key-only: [B, Hkv, Sk], packed [total_k, Hkv]. Dense (not packed): [B or
  // 1, 1 or Hkv or H, Sq or 1, Sk], of any floating type. -inf hides: a key-only one hides its key from
  // everybody, a dense one from its row. The key and value of a key that no row sees may hold anything.
  TensorView bias{};
  // Optional, bool, with the dense shapes of bias: true where a row sees a key, provided that everything else
  // (causality, expiry, bias) lets it.
  TensorView mask{};
  // Optional, int32, shaped like bias: from select, or the caller's own. Absent: every key (before the query,
  // if causal) is visible. Any value is safe.
  TensorView expiry{};
  // Optional: the scores that expiry was selected by, shaped like it, and the window of that selection; 0:
  // expiry is the caller's own. They change a result in its last bits alone: CUDA kernels read keys in the
  // order of their scores, which keeps a row's bits independent of later tokens, or else of their expiry. CPU
  // kernels read them in the order of their positions and look at neither.
  TensorView score{};
  std::int64_t keep_window = 0;
  // Optional, int32 [n]: what plan made of the same arguments. Only CUDA kernels take one.
  TensorView plan{};

  TensorView cu_seqlens_q{};  // int32 [sequences + 1], present for packed sequences only
  TensorView cu_seqlens_k{};  // likewise
  TensorView out{};           // out, like query; 0 for a row that sees no key
  TensorView lse{};  // out, optional, [B, H, Sq], packed [H, total_q]: natural log of the sum of exp(logit);
                     // -inf for a row that sees no key
  double scale = 0;  // of query . key; usually 1 / sqrt(D)
  bool causal = true;  // needs Sq <= Sk in every sequence
};

struct BackwardArgs {
  // As in ForwardArgs.
  TensorView query{}, key{}, value{}, bias{}, mask{}, expiry{}, score{};
  std::int64_t keep_window = 0;
  TensorView plan{}, cu_seqlens_q{}, cu_seqlens_k{};

  TensorView out{}, lse{};  // what forward returned; lse is needed here
  TensorView dout{};        // like out
  TensorView dlse{};        // optional, like lse
  // Out, like query, key, value, bias, summed over the axes along which a dense bias has size 1; an absent
  // one is not computed.
  TensorView dq{}, dk{}, dv{}, dbias{};
  double scale = 0;
  bool causal = true;
};

// Each checks its arguments first and reads and writes nothing if they are wrong.
Status select(const SelectArgs& args, const Target& target, const Workspace& workspace);
Status plan(const PlanArgs& args, const Target& target, const Workspace& workspace);
Status forward(const ForwardArgs& args, const Target& target, const Workspace& workspace);
Status backward(const BackwardArgs& args, const Target& target, const Workspace& workspace);

// Bytes of workspace that a call with these arguments needs; 0 for arguments that the call would refuse.
// The formulas are in docs/numerics.md.
std::size_t workspace_bytes(const SelectArgs& args, const Target& target);
std::size_t workspace_bytes(const PlanArgs& args, const Target& target);
std::size_t workspace_bytes(const ForwardArgs& args, const Target& target);
std::size_t workspace_bytes(const BackwardArgs& args, const Target& target);

// The size of PlanArgs::plan; args.plan may be absent.
std::size_t plan_elements(const PlanArgs& args, const Target& target);

// Why a call with these arguments would be refused, or "" if it would run.
std::string why_unsupported(const SelectArgs& args, const Target& target);
std::string why_unsupported(const PlanArgs& args, const Target& target);
std::string why_unsupported(const ForwardArgs& args, const Target& target);
std::string why_unsupported(const BackwardArgs& args, const Target& target);

// One line per kernel that could serve the call, first choice first: "<name>: runs" or "<name>: <why not>".
std::string explain(const ForwardArgs& args, const Target& target);
std::string explain(const BackwardArgs& args, const Target& target);

// "1.2.3", and what this build runs on: "cpu (AVX2); cuda (sm_80, PTX)".
const char* version();
std::string describe_build();

}  // namespace flash_dmattn
