// Every precondition: the call is refused, the message names the function, the argument, what it got and what
// is accepted, and no output is touched.
#include <cstdio>
#include <limits>

#include "support.h"

namespace flash_dmattn::testing {
namespace {

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min();
constexpr double kInf = std::numeric_limits<double>::infinity();

// Memory and arguments of a valid call, to be spoilt: B 2, Sq 3, Sk 5, H 4, Hkv 2, D 8; packed: 3 + 3 rows, 5
// + 5 keys.
struct Call {
  explicit Call(bool packed = false) {
    const auto q_rows = [&] { return packed ? Index{6, 4, 8} : Index{2, 3, 4, 8}; };
    const auto k_rows = [&] { return packed ? Index{10, 2, 8} : Index{2, 5, 2, 8}; };
    const auto per_key = [&] { return packed ? Index{10, 2} : Index{2, 2, 5}; };
    const auto per_query = [&] { return packed ? Index{4, 6} : Index{2, 4, 3}; };
    score = Tensor(DType::kFloat32, per_key());
    expiry = Tensor(DType::kInt32, per_key());
    query = Tensor(DType::kFloat32, q_rows());
    key = Tensor(DType::kFloat32, k_rows());
    value = Tensor(DType::kFloat32, k_rows());
    bias = Tensor(DType::kFloat32, per_key());
    out = Tensor(DType::kFloat32, q_rows());
    lse = Tensor(DType::kFloat32, per_query());
    dout = Tensor(DType::kFloat32, q_rows());
    dlse = Tensor(DType::kFloat32, per_query());
    dq = Tensor(DType::kFloat32, q_rows());
    dk = Tensor(DType::kFloat32, k_rows());
    dv = Tensor(DType::kFloat32, k_rows());
    dbias = Tensor(DType::kFloat32, per_key());
    for (Tensor* tensor : {&score, &expiry, &query, &key, &value, &bias, &dout, &dlse}) {
      tensor->fill([] { return 1.0; });
    }
    select.score = score.view();
    select.expiry = expiry.view();
    select.keep_window = 2;
    fill(forward);
    fill(backward);
    backward.dout = dout.view();
    backward.dlse = dlse.view();
    backward.dq = dq.view();
    backward.dk = dk.view();
    backward.dv = dv.view();
    backward.dbias = dbias.view();
    if (packed) {
      cu_seqlens_q = offsets({0, 3, 6});
      cu_seqlens_k = offsets({0, 5, 10});
      select.cu_seqlens = forward.cu_seqlens_k = backward.cu_seqlens_k = cu_seqlens_k.view();
      forward.cu_seqlens_q = backward.cu_seqlens_q = cu_seqlens_q.view();
    }
  }

  // A mask or a dense bias, all of it one tensor's memory.
  TensorView dense(DType dtype, std::initializer_list<std::int64_t> shape) {
    return contiguous_view(dense_memory.data(), dtype, shape);
  }

  static Tensor offsets(const Index& values) {
    Tensor tensor(DType::kInt32, {static_cast<std::int64_t>(values.size())});
    for (std::size_t i = 0; i < values.size(); ++i) {
      tensor.set({static_cast<std::int64_t>(i)}, static_cast<double>(values[i]));
    }
    return tensor;
  }

  template <typename Args>
  void fill(Args& args) {
    args.query = query.view();
    args.key = key.view();
    args.value = value.view();
    args.bias = bias.view();
    args.expiry = expiry.view();
    args.out = out.view();
    args.lse = lse.view();
    args.scale = 0.5;
  }

  Tensor score, expiry, query, key, value, bias, out, lse, dout, dlse, dq, dk, dv, dbias, cu_seqlens_q,
      cu_seqlens_k;
  std::vector<double> dense_memory = std::vector<double>(1 * 4 * 6 * 10);
  SelectArgs select;
  ForwardArgs forward;
  BackwardArgs backward;
  Target target;
};

int num_refused = 0;

class Validation : public ::testing::Test {
 protected:
  static void TearDownTestSuite() { std::printf("%d wrong calls refused\n", num_refused); }
};

// The call is refused with this message by every entry, before anything is written.
template <typename Args>
void expect_refused(Status (*function)(const Args&, const Target&, const Workspace&), const Call& call,
                    const Args& args, const std::string& message) {
  const std::vector<const Tensor*> outputs = {&call.expiry, &call.out, &call.lse,  &call.dq,
                                              &call.dk,     &call.dv,  &call.dbias};
  std::vector<std::vector<unsigned char>> before;
  for (const Tensor* output : outputs) before.push_back(output->bytes());
  std::vector<unsigned char> memory(1 << 20);
  const Status status = function(args, call.target, {.data = memory.data(), .bytes = memory.size()});
  EXPECT_EQ(status.code, StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message, message);
  EXPECT_EQ(why_unsupported(args, call.target), message);
  EXPECT_EQ(workspace_bytes(args, call.target), 0u);
  for (std::size_t i = 0; i < outputs.size(); ++i) EXPECT_EQ(outputs[i]->bytes(), before[i]);
  ++num_refused;
}

template <typename Args>
struct Case {
  std::function<void(Call&, Args&)> spoil;
  std::string message;  // behind "flash_dmattn::<function>: "
};

void make_shape(TensorView& view, std::initializer_list<std::int64_t> shape) {
  view = contiguous_view(view.data, view.dtype, shape);
}

void check_all(const std::vector<Case<SelectArgs>>& cases, bool packed) {
  for (const Case<SelectArgs>& one : cases) {
    Call call(packed);
    one.spoil(call, call.select);
    expect_refused(select, call, call.select, "flash_dmattn::select: " + one.message);
  }
}

// Preconditions on what forward and backward share are checked by both.
void check_both(const std::vector<Case<ForwardArgs>>& cases, bool packed) {
  for (const Case<ForwardArgs>& one : cases) {
    Call call(packed);
    one.spoil(call, call.forward);
    expect_refused(forward, call, call.forward, "flash_dmattn::forward: " + one.message);
    BackwardArgs backward_args = call.backward;
    const ForwardArgs& spoilt = call.forward;
    backward_args.query = spoilt.query;
    backward_args.key = spoilt.key;
    backward_args.value = spoilt.value;
    backward_args.bias = spoilt.bias;
    backward_args.mask = spoilt.mask;
    if (spoilt.bias.rank == 4) backward_args.dbias = {};
    backward_args.expiry = spoilt.expiry;
    backward_args.score = spoilt.score;
    backward_args.keep_window = spoilt.keep_window;
    backward_args.plan = spoilt.plan;
    backward_args.cu_seqlens_q = spoilt.cu_seqlens_q;
    backward_args.cu_seqlens_k = spoilt.cu_seqlens_k;
    backward_args.scale = spoilt.scale;
    expect_refused(backward, call, backward_args, "flash_dmattn::backward: " + one.message);
  }
}

TEST_F(Validation, TheCallsBeforeTheyAreSpoiltAreAccepted) {
  for (const bool packed : {false, true}) {
    const Call call(packed);
    EXPECT_EQ(why_unsupported(call.select, call.target), "");
    EXPECT_EQ(why_unsupported(call.forward, call.target), "");
    EXPECT_EQ(why_unsupported(call.backward, call.target), "");
  }
}

TEST_F(Validation, Select) {
  check_all(
      {
          {[](Call&, SelectArgs& a) { a.keep_window = 0; }, "keep_window: got 0, expected at least 1"},
          {[](Call&, SelectArgs& a) { a.keep_window = kMin; },
           "keep_window: got -9223372036854775808, expected at least 1"},
          {[](Call&, SelectArgs& a) { a.num_sinks = -1; }, "num_sinks: got -1, expected at least 0"},
          {[](Call&, SelectArgs& a) { a.local_window = -2; }, "local_window: got -2, expected at least 0"},
          {[](Call&, SelectArgs& a) {
             a.local_window = 2;
             a.causal = false;
           },
           "local_window: got 2 without causal, expected 0: local keys need an order"},
          {[](Call&, SelectArgs& a) { a.score = {}; }, "score: got no tensor, expected [B, Hkv, Sk]"},
          {[](Call&, SelectArgs& a) { make_shape(a.score, {2, 5}); },
           "score: got shape [2, 5], expected [B, Hkv, Sk]"},
          {[](Call&, SelectArgs& a) { a.score.rank = 7; }, "score: got rank 7, expected [B, Hkv, Sk]"},
          {[](Call&, SelectArgs& a) { a.score.rank = -1; }, "score: got rank -1, expected [B, Hkv, Sk]"},
          {[](Call&, SelectArgs& a) { a.score.dtype = DType::kInt32; },
           "score: got dtype int32, expected float64, float32, bfloat16 or float16"},
          {[](Call&, SelectArgs& a) { a.score.dtype = static_cast<DType>(77); },
           "score: got dtype of no known type, expected float64, float32, bfloat16 or float16"},
          {[](Call&, SelectArgs& a) { a.score.shape[2] = -5; },
           "score: got shape [2, 2, -5], expected sizes from 0 to 2147483647"},
          {[](Call&, SelectArgs& a) { a.score.shape[2] = std::int64_t{1} << 31; },
           "score: got shape [2, 2, 2147483648], expected sizes from 0 to 2147483647"},
          {[](Call&, SelectArgs& a) {
             make_shape(a.score, {1 << 30, 1 << 30, 1 << 30});
             a.score.stride = {0, 0, 0, 0};
           },
           "score: got shape [1073741824, 1073741824, 1073741824], expected at most 2^56 bytes"},
          {[](Call&, SelectArgs& a) { make_shape(a.score, {1 << 30, 1 << 30, 0}); },
           "score: got shape [1073741824, 1073741824, 0], expected at most 2^56 bytes"},
          {[](Call&, SelectArgs& a) { a.score.stride[1] = kMax; },
           "score: got strides [10, 9223372036854775807, 1], expected elements within 2^56 bytes"},
          {[](Call&, SelectArgs& a) { a.score.stride[0] = kMin; },
           "score: got strides [-9223372036854775808, 5, 1], expected elements within 2^56 bytes"},
          {[](Call&, SelectArgs& a) { a.score.data = nullptr; },
           "score: got a null pointer, expected memory for shape [2, 2, 5]"},
          {[](Call&, SelectArgs& a) { a.score.data = static_cast<char*>(a.score.data) + 1; },
           "score: got misaligned memory, expected an address divisible by 4"},
          {[](Call&, SelectArgs& a) { a.expiry = {}; },
           "expiry: got no tensor, expected [B, Hkv, Sk] with B = 2, Hkv = 2, Sk = 5"},
          {[](Call&, SelectArgs& a) { a.expiry.dtype = DType::kFloat32; },
           "expiry: got dtype float32, expected int32"},
          {[](Call&, SelectArgs& a) { make_shape(a.expiry, {2, 2, 4}); },
           "expiry: got shape [2, 2, 4], expected [B, Hkv, Sk] with B = 2, Hkv = 2, Sk = 5"},
          {[](Call&, SelectArgs& a) { a.expiry.stride[1] = 0; },
           "expiry: got shape [2, 2, 5] with strides [10, 0, 1], expected strides under which no two "
           "elements of "
           "an output share memory"},
          {[](Call&, SelectArgs& a) { a.expiry.stride = {10, -1, 1}; },
           "expiry: got shape [2, 2, 5] with strides [10, -1, 1], expected strides under which no two "
           "elements of "
           "an output share memory"},
          {[](Call&, SelectArgs& a) { a.expiry.data = a.score.data; },
           "expiry: got the memory of score, expected memory of its own"},
          {[](Call&, SelectArgs& a) { a.num_queries = -2; },
           "num_queries: got -2, expected 0 to Sk = 5, or -1 for all"},
          {[](Call&, SelectArgs& a) { a.num_queries = 6; },
           "num_queries: got 6, expected 0 to Sk = 5, or -1 for all"},
          {[](Call&, SelectArgs& a) {
             a.num_queries = 3;
             a.causal = false;
           },
           "num_queries: got 3 without causal, expected -1, all"},
          {[](Call& c, SelectArgs&) { c.target.parallel_for.num_workers = 0; },
           "parallel_for.num_workers: got 0, expected 1 to 65536"},
          {[](Call& c, SelectArgs&) { c.target.parallel_for.num_workers = 1 << 20; },
           "parallel_for.num_workers: got 1048576, expected 1 to 65536"},
          {[](Call& c, SelectArgs&) { c.target.parallel_for.run = nullptr; },
           "parallel_for.run: got a null pointer, expected a function"},
      },
      /*packed=*/false);
}

TEST_F(Validation, SelectPacked) {
  check_all(
      {
          {[](Call&, SelectArgs& a) { make_shape(a.score, {1, 10, 2}); },
           "score: got shape [1, 10, 2], expected [total_k, Hkv]"},
          {[](Call&, SelectArgs& a) { make_shape(a.expiry, {2, 10}); },
           "expiry: got shape [2, 10], expected [total_k, Hkv] with total_k = 10, Hkv = 2"},
          {[](Call& c, SelectArgs& a) {
             (c.cu_seqlens_k = Call::offsets({0, 5, 9})), a.cu_seqlens = c.cu_seqlens_k.view();
           },
           "cu_seqlens: got 9 at the end, expected total_k = 10"},
          {[](Call& c, SelectArgs& a) {
             (c.cu_seqlens_k = Call::offsets({1, 5, 10})), a.cu_seqlens = c.cu_seqlens_k.view();
           },
           "cu_seqlens: got 1 at index 0, expected 0"},
          {[](Call&, SelectArgs& a) { make_shape(a.cu_seqlens, {0}); },
           "cu_seqlens: got shape [0], expected [sequences + 1], the first element 0"},
          {[](Call&, SelectArgs& a) { a.num_queries = 3; },
           "num_queries: got 3 with cu_seqlens, expected -1, all"},
      },
      /*packed=*/true);
}

TEST_F(Validation, Attention) {
  check_both(
      {
          {[](Call&, ForwardArgs& a) { a.query = {}; }, "query: got no tensor, expected [B, Sq, H, D]"},
          {[](Call&, ForwardArgs& a) { make_shape(a.query, {3, 4, 8}); },
           "query: got shape [3, 4, 8], expected [B, Sq, H, D]"},
          {[](Call&, ForwardArgs& a) { a.query.dtype = DType::kInt32; },
           "query: got dtype int32, expected float64, float32, bfloat16 or float16"},
          {[](Call&, ForwardArgs& a) {
             make_shape(a.query, {2, 3, 4, 0});
             make_shape(a.key, {2, 5, 2, 0});
           },
           "query: got head dim D = 0, expected at least 1"},
          {[](Call&, ForwardArgs& a) { a.query.data = nullptr; },
           "query: got a null pointer, expected memory for shape [2, 3, 4, 8]"},
          {[](Call&, ForwardArgs& a) { a.key = {}; },
           "key: got no tensor, expected [B, Sk, Hkv, D] with B = 2, D = 8"},
          {[](Call&, ForwardArgs& a) { make_shape(a.key, {2, 5, 2, 4}); },
           "key: got shape [2, 5, 2, 4], expected [B, Sk, Hkv, D] with B = 2, D = 8"},
          {[](Call&, ForwardArgs& a) { make_shape(a.key, {1, 5, 2, 8}); },
           "key: got shape [1, 5, 2, 8], expected [B, Sk, Hkv, D] with B = 2, D = 8"},
          {[](Call&, ForwardArgs& a) { a.key.dtype = DType::kBFloat16; },
           "key: got dtype bfloat16, expected float32"},
          {[](Call&, ForwardArgs& a) { make_shape(a.key, {2, 3, 3, 8}); },
           "key: got Hkv = 3, expected a divisor of query's H = 4"},
          {[](Call&, ForwardArgs& a) { make_shape(a.key, {2, 5, 0, 8}); },
           "key: got Hkv = 0, expected a divisor of query's H = 4"},
          {[](Call&, ForwardArgs& a) { a.value = {}; },
           "value: got no tensor, expected [B, Sk, Hkv, D] with B = 2, Sk = 5, Hkv = 2, D = 8"},
          {[](Call&, ForwardArgs& a) { make_shape(a.value, {2, 4, 2, 8}); },
           "value: got shape [2, 4, 2, 8], expected [B, Sk, Hkv, D] with B = 2, Sk = 5, Hkv = 2, D = 8"},
          {[](Call&, ForwardArgs& a) { a.value.data = static_cast<char*>(a.value.data) + 2; },
           "value: got misaligned memory, expected an address divisible by 4"},
          {[](Call&, ForwardArgs& a) { make_shape(a.bias, {2, 1, 5}); },
           "bias: got shape [2, 1, 5], expected [B, Hkv, Sk] with B = 2, Hkv = 2, Sk = 5"},
          {[](Call&, ForwardArgs& a) { a.bias.dtype = DType::kFloat64; },
           "bias: got dtype float64, expected float32"},
          {[](Call&, ForwardArgs& a) { a.expiry.dtype = DType::kFloat32; },
           "expiry: got dtype float32, expected int32"},
          {[](Call&, ForwardArgs& a) { make_shape(a.expiry, {2, 2, 6}); },
           "expiry: got shape [2, 2, 6], expected [B, Hkv, Sk] with B = 2, Hkv = 2, Sk = 5"},
          {[](Call&, ForwardArgs& a) {
             make_shape(a.key, {2, 2, 2, 8});
             make_shape(a.value, {2, 2, 2, 8});
             a.bias = a.expiry = {};
           },
           "query: got Sq = 3, expected at most Sk = 2 when causal"},
          {[](Call&, ForwardArgs& a) { a.scale = kInf; }, "scale: got inf, expected a finite number"},
          {[](Call&, ForwardArgs& a) { a.scale = -kInf; }, "scale: got -inf, expected a finite number"},
          {[](Call&, ForwardArgs& a) { a.scale = std::nan(""); }, "scale: got nan, expected a finite number"},
          {[](Call& c, ForwardArgs&) { c.target.parallel_for.num_workers = -3; },
           "parallel_for.num_workers: got -3, expected 1 to 65536"},
          {[](Call&, ForwardArgs& a) {
             a.query.shape = {kMax, kMax, kMax, kMax};
             a.query.stride = {0, 0, 0, 0};
           },
           "query: got shape [9223372036854775807, 9223372036854775807, 9223372036854775807, "
           "9223372036854775807], "
           "expected sizes from 0 to 2147483647"},
          {[](Call& c, ForwardArgs& a) {
             (c.cu_seqlens_q = Call::offsets({0, 3, 6})), a.cu_seqlens_q = c.cu_seqlens_q.view();
           },
           "query: got shape [2, 3, 4, 8], expected [total_q, H, D]"},
          {[](Call&, ForwardArgs& a) { a.keep_window = -1; }, "keep_window: got -1, expected at least 0"},
          {[](Call&, ForwardArgs& a) {
             a.keep_window = 2;
             a.expiry = {};
           },
           "keep_window: got 2 without expiry, expected 0"},
          {[](Call& c, ForwardArgs& a) {
             a.score = c.score.view();
             a.expiry = {};
           },
           "score: got a tensor without expiry, expected none"},
          {[](Call& c, ForwardArgs& a) {
             a.score = c.score.view();
             a.score.dtype = DType::kInt32;
           },
           "score: got dtype int32, expected float64, float32, bfloat16 or float16"},
          {[](Call& c, ForwardArgs& a) {
             a.score = c.score.view();
             make_shape(a.score, {2, 2, 4});
           },
           "score: got shape [2, 2, 4], expected [B, Hkv, Sk] with B = 2, Hkv = 2, Sk = 5"},
          {[](Call& c, ForwardArgs& a) { a.plan = c.expiry.view(); },
           "plan: got shape [2, 2, 5], expected [n]"},
          {[](Call& c, ForwardArgs& a) {
             a.plan = contiguous_view(c.expiry.view().data, DType::kInt32, {5});
             a.plan.stride[0] = 2;
           },
           "plan: got strides [2], expected contiguous memory"},
          {[](Call& c, ForwardArgs& a) { a.bias = c.dense(DType::kFloat16, {2, 3, 3, 5}); },
           "bias: got shape [2, 3, 3, 5], expected [B, H, Sq, Sk] with B = 2 or 1, H = 4, 2 or 1, "
           "Sq = 3 or 1, Sk = 5"},
          {[](Call& c, ForwardArgs& a) { a.bias = c.dense(DType::kFloat32, {2, 4, 3, 1}); },
           "bias: got shape [2, 4, 3, 1], expected [B, H, Sq, Sk] with B = 2 or 1, H = 4, 2 or 1, "
           "Sq = 3 or 1, Sk = 5"},
          {[](Call& c, ForwardArgs& a) { a.bias = c.dense(DType::kBool, {2, 4, 3, 5}); },
           "bias: got dtype bool, expected float64, float32, bfloat16 or float16"},
          {[](Call& c, ForwardArgs& a) { a.mask = c.dense(DType::kBool, {2, 4, 2, 5}); },
           "mask: got shape [2, 4, 2, 5], expected [B, H, Sq, Sk] with B = 2 or 1, H = 4, 2 or 1, "
           "Sq = 3 or 1, Sk = 5"},
          {[](Call& c, ForwardArgs& a) { a.mask = c.dense(DType::kBool, {2, 2, 5}); },
           "mask: got shape [2, 2, 5], expected [B, H, Sq, Sk] with B = 2 or 1, H = 4, 2 or 1, "
           "Sq = 3 or 1, Sk = 5"},
          {[](Call& c, ForwardArgs& a) { a.mask = c.dense(DType::kFloat32, {2, 4, 3, 5}); },
           "mask: got dtype float32, expected bool"},
      },
      /*packed=*/false);
}

TEST_F(Validation, AttentionPacked) {
  const auto with_offsets = [](const Index& q, const Index& k) {
    return [q, k](Call& call, ForwardArgs& args) {
      call.cu_seqlens_q = Call::offsets(q);
      call.cu_seqlens_k = Call::offsets(k);
      args.cu_seqlens_q = call.cu_seqlens_q.view();
      args.cu_seqlens_k = call.cu_seqlens_k.view();
    };
  };
  check_both(
      {
          {[](Call&, ForwardArgs& a) { a.cu_seqlens_q = {}; },
           "cu_seqlens_q: got no tensor, expected [sequences + 1]"},
          {[](Call&, ForwardArgs& a) { a.cu_seqlens_k = {}; },
           "cu_seqlens_k: got no tensor, expected [sequences + 1]"},
          {[](Call&, ForwardArgs& a) { a.cu_seqlens_q.dtype = DType::kFloat32; },
           "cu_seqlens_q: got dtype float32, expected int32"},
          {[](Call&, ForwardArgs& a) { make_shape(a.key, {2, 5, 2, 8}); },
           "key: got shape [2, 5, 2, 8], expected [total_k, Hkv, D] with D = 8"},
          {[](Call&, ForwardArgs& a) { make_shape(a.bias, {2, 10}); },
           "bias: got shape [2, 10], expected [total_k, Hkv] with total_k = 10, Hkv = 2"},
          {[](Call& c, ForwardArgs& a) { a.bias = c.dense(DType::kFloat32, {1, 4, 6, 10}); },
           "bias: got shape [1, 4, 6, 10], expected [total_k, Hkv] with total_k = 10, Hkv = 2"},
          {[](Call& c, ForwardArgs& a) { a.mask = c.dense(DType::kBool, {1, 4, 6, 10}); },
           "mask: got a tensor with cu_seqlens, expected none: packed sequences take no mask"},
          {with_offsets({0, 3, 6}, {0, 11, 10}),
           "cu_seqlens_k: got 10 at index 2, expected at least 11, the offset "
           "before it"},
          {with_offsets({0, -1, 6}, {0, 5, 10}),
           "cu_seqlens_q: got -1 at index 1, expected at least 0, the offset "
           "before it"},
          {with_offsets({0, 3, 7}, {0, 5, 10}), "cu_seqlens_q: got 7 at the end, expected total_q = 6"},
          {with_offsets({0, 3, 5}, {0, 5, 10}), "cu_seqlens_q: got 5 at the end, expected total_q = 6"},
          {with_offsets({2, 3, 6}, {0, 5, 10}), "cu_seqlens_q: got 2 at index 0, expected 0"},
          {with_offsets({0, 3, 6}, {0, 5, 7, 10}),
           "cu_seqlens_k: got 4 elements, expected 3 as in cu_seqlens_q"},
          {with_offsets({0, 1, 6}, {0, 6, 10}),
           "cu_seqlens_q: got 5 rows in sequence 1, expected at most its 4 keys when causal"},
      },
      /*packed=*/true);
}

TEST_F(Validation, ForwardOutputs) {
  const std::vector<Case<ForwardArgs>> cases = {
      {[](Call&, ForwardArgs& a) { a.out = {}; },
       "out: got no tensor, expected [B, Sq, H, D] with B = 2, Sq = 3, H = 4, D = 8"},
      {[](Call&, ForwardArgs& a) { a.out.dtype = DType::kFloat16; },
       "out: got dtype float16, expected float32"},
      {[](Call&, ForwardArgs& a) { a.out.stride[3] = 0; },
       "out: got shape [2, 3, 4, 8] with strides [96, 32, 8, 0], expected strides under which no two "
       "elements of an "
       "output share memory"},
      {[](Call&, ForwardArgs& a) { a.out.data = a.query.data; },
       "out: got the memory of query, expected memory of its own"},
      {[](Call&, ForwardArgs& a) { make_shape(a.lse, {2, 3, 4}); },
       "lse: got shape [2, 3, 4], expected [B, H, Sq] with B = 2, H = 4, Sq = 3"},
      {[](Call&, ForwardArgs& a) { a.lse.dtype = DType::kFloat64; },
       "lse: got dtype float64, expected float32"},
      {[](Call&, ForwardArgs& a) { a.lse.data = a.out.data; },
       "lse: got the memory of out, expected memory of its own"},
  };
  for (const Case<ForwardArgs>& one : cases) {
    Call call;
    one.spoil(call, call.forward);
    expect_refused(forward, call, call.forward, "flash_dmattn::forward: " + one.message);
  }
}

TEST_F(Validation, BackwardTensors) {
  const std::vector<Case<BackwardArgs>> cases = {
      {[](Call&, BackwardArgs& a) { a.out = {}; },
       "out: got no tensor, expected [B, Sq, H, D] with B = 2, Sq = 3, H = 4, D = 8"},
      {[](Call&, BackwardArgs& a) { a.lse = {}; },
       "lse: got no tensor, expected [B, H, Sq] with B = 2, H = 4, Sq = 3"},
      {[](Call&, BackwardArgs& a) { a.dout = {}; },
       "dout: got no tensor, expected [B, Sq, H, D] with B = 2, Sq = 3, H = 4, D = 8"},
      {[](Call&, BackwardArgs& a) { make_shape(a.dout, {2, 4, 3, 8}); },
       "dout: got shape [2, 4, 3, 8], expected [B, Sq, H, D] with B = 2, Sq = 3, H = 4, D = 8"},
      {[](Call&, BackwardArgs& a) { a.dlse.dtype = DType::kBFloat16; },
       "dlse: got dtype bfloat16, expected float32"},
      {[](Call&, BackwardArgs& a) { make_shape(a.dq, {2, 3, 4, 4}); },
       "dq: got shape [2, 3, 4, 4], expected [B, Sq, H, D] with B = 2, Sq = 3, H = 4, D = 8"},
      {[](Call&, BackwardArgs& a) { make_shape(a.dk, {2, 5, 4, 8}); },
       "dk: got shape [2, 5, 4, 8], expected [B, Sk, Hkv, D] with B = 2, Sk = 5, Hkv = 2, D = 8"},
      {[](Call&, BackwardArgs& a) { a.dv.data = a.value.data; },
       "dv: got the memory of value, expected memory of its own"},
      {[](Call&, BackwardArgs& a) { a.dv.data = a.dk.data; },
       "dv: got the memory of dk, expected memory of its own"},
      {[](Call&, BackwardArgs& a) { a.dv.stride[1] = 0; },
       "dv: got shape [2, 5, 2, 8] with strides [80, 0, 8, 1], expected strides under which no two elements "
       "of an "
       "output share memory"},
      {[](Call&, BackwardArgs& a) { a.dbias.dtype = DType::kFloat16; },
       "dbias: got dtype float16, expected float32"},
      {[](Call& c, BackwardArgs& a) { a.bias = c.dense(DType::kFloat16, {2, 1, 3, 5}); },
       "dbias: got shape [2, 2, 5], expected [B, H, Sq, Sk] with B = 2, H = 1, Sq = 3, Sk = 5"},
      {[](Call& c, BackwardArgs& a) {
         a.bias = c.dense(DType::kFloat16, {1, 1, 1, 5});
         make_shape(a.dbias, {1, 1, 1, 5});
       },
       "dbias: got dtype float32, expected float16"},
      {[](Call&, BackwardArgs& a) { a.bias = {}; }, "dbias: got a tensor without bias, expected none"},
  };
  for (const Case<BackwardArgs>& one : cases) {
    Call call;
    one.spoil(call, call.backward);
    expect_refused(backward, call, call.backward, "flash_dmattn::backward: " + one.message);
  }
}

template <typename Args>
void check_workspace(const std::string& name,
                     Status (*function)(const Args&, const Target&, const Workspace&), const Args& args) {
  const std::size_t bytes = workspace_bytes(args, {});
  ASSERT_GT(bytes, 0u);
  std::vector<unsigned char> memory(bytes);
  const Status small = function(args, {}, {.data = memory.data(), .bytes = bytes - 1});
  EXPECT_EQ(small.code, StatusCode::kInvalidArgument);
  EXPECT_EQ(small.message, "flash_dmattn::" + name + ": workspace: got " + std::to_string(bytes - 1) +
                               " bytes, expected at least " + std::to_string(bytes) +
                               ", as workspace_bytes says");
  const Status null = function(args, {}, {.data = nullptr, .bytes = bytes});
  EXPECT_EQ(null.code, StatusCode::kInvalidArgument);
  EXPECT_EQ(null.message, "flash_dmattn::" + name + ": workspace: got a null pointer, expected " +
                              std::to_string(bytes) + " bytes of memory");
  num_refused += 2;
}

TEST_F(Validation, Workspace) {
  const Call call;
  check_workspace("select", select, call.select);
  check_workspace("forward", forward, call.forward);
  check_workspace("backward", backward, call.backward);
}

// Strides of axes of size 1 mean nothing, empty tensors need no memory, inputs may overlap and repeat.
TEST_F(Validation, HarmlessOddities) {
  Call call;
  for (TensorView* view : {&call.forward.query, &call.forward.key, &call.forward.value}) {
    view->shape[0] = 1;
    view->stride[0] = kMin;
  }
  for (TensorView* view : {&call.forward.bias, &call.forward.expiry, &call.forward.out, &call.forward.lse}) {
    view->shape[0] = 1;
    view->stride[0] = 0;
  }
  call.forward.value = call.forward.key;
  call.forward.key.stride[3] = 0;
  EXPECT_EQ(why_unsupported(call.forward, call.target), "");

  ForwardArgs empty;
  empty.query = contiguous_view(static_cast<void*>(nullptr), DType::kFloat32, {0, 3, 4, 8});
  empty.key = empty.value = contiguous_view(static_cast<void*>(nullptr), DType::kFloat32, {0, 5, 2, 8});
  empty.out = empty.query;
  EXPECT_EQ(why_unsupported(empty, call.target), "");
}

TEST_F(Validation, ExplainNamesEveryKernel) {
  Call call;
  EXPECT_EQ(explain(call.forward, call.target), "cpu decode: runs\ncpu: runs");
  EXPECT_EQ(explain(call.backward, call.target), "cpu: runs");
  call.forward.scale = kInf;
  EXPECT_EQ(explain(call.forward, call.target),
            "flash_dmattn::forward: scale: got inf, expected a finite number");
}

}  // namespace
}  // namespace flash_dmattn::testing
