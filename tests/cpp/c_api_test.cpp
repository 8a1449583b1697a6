// The C interface: what it adds to the C++ one. Structs of other versions, every refusal of its own, status
// and message, exceptions; and that each field arrives.
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>

#include "attention_case.h"
#include "c_args.h"
#include "support.h"

namespace {
thread_local bool memory_is_out = false;
}  // namespace

// Of the whole program. Not inlined: the compiler would see what a new expression pairs with.
#define NOINLINE __attribute__((noinline))
NOINLINE void* operator new(std::size_t bytes) {
  void* memory = memory_is_out ? nullptr : std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
NOINLINE void operator delete(void* memory) noexcept { std::free(memory); }
NOINLINE void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
#undef NOINLINE

namespace flash_dmattn::testing {
namespace {

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();

std::string error() { return flash_dmattn_last_error(); }

// A valid call of each pass that runs on the CPU, and a valid plan, which does not.
struct Calls {
  Calls() : problem({.sequences = {{3, 5}}, .visibility = Visibility::kRandomExpiry}, 1) {
    out = problem.like_query();
    lse = problem.like_lse();
    expiry = Tensor(DType::kInt32, problem.bias.shape());
    gradients = {problem.like_query(), problem.like_key(), problem.like_key(), problem.like_bias()};
    SelectArgs select_args;
    select_args.score = problem.bias.view();
    select_args.expiry = expiry.view();
    select_args.keep_window = 2;
    select = to_c(select_args);
    ForwardArgs forward_args = problem.forward_args();
    forward_args.out = out.view();
    forward_args.lse = lse.view();
    forward = to_c(forward_args);
    BackwardArgs backward_args = problem.backward_args();
    backward_args.out = out.view();
    backward_args.lse = lse.view();
    backward_args.dq = gradients.dq.view();
    backward_args.dk = gradients.dk.view();
    backward_args.dv = gradients.dv.view();
    backward_args.dbias = gradients.dbias.view();
    backward = to_c(backward_args);
    PlanArgs plan_args;
    plan_args.expiry = problem.expiry.view();
    plan_args.num_queries = 3;
    plan = to_c(plan_args);
  }

  Problem problem;
  Tensor out, lse, expiry;
  Gradients gradients;
  flash_dmattn_select_args select;
  flash_dmattn_plan_args plan;
  flash_dmattn_forward_args forward;
  flash_dmattn_backward_args backward;
};

template <typename Args>
flash_dmattn_status run_in_workspace(const Args& args, const flash_dmattn_target* target = nullptr) {
  std::size_t bytes = 0;
  if (const auto status = c_workspace_bytes(&args, target, &bytes); status != FLASH_DMATTN_OK) return status;
  std::vector<unsigned char> memory(bytes);
  return c_run(&args, target, memory.data(), bytes);
}

// Every entry refuses the call with this status and message, and returns a size of 0.
template <typename Args>
void expect_refused(const Args* args, const flash_dmattn_target* target, flash_dmattn_status status,
                    const std::string& message) {
  std::vector<unsigned char> memory(1 << 20);
  EXPECT_EQ(c_run(args, target, memory.data(), memory.size()), status);
  EXPECT_EQ(error(), message);
  std::size_t bytes = 1;
  EXPECT_EQ(c_workspace_bytes(args, target, &bytes), status);
  EXPECT_EQ(error(), message);
  EXPECT_EQ(bytes, 0u);
}

template <typename Args>
void expect_invalid(const Args& args, const std::string& message,
                    const flash_dmattn_target* target = nullptr) {
  expect_refused(&args, target, FLASH_DMATTN_INVALID_ARGUMENT, message);
}

template <typename Args>
struct Field {
  const char* name;
  flash_dmattn_tensor Args::*tensor;
};

template <typename Args>
void check_fields(const std::string& function, const Args& valid, const std::vector<Field<Args>>& fields) {
  EXPECT_EQ(sizeof(Args) / sizeof(flash_dmattn_tensor), fields.size()) << "a tensor is not in the table";
  for (const Field<Args>& field : fields) {
    for (const int dtype : {0, 7, 257, -1}) {
      Args args = valid;
      (args.*field.tensor).rank = 1;
      (args.*field.tensor).dtype = dtype;
      expect_invalid(args, "flash_dmattn::" + function + ": " + field.name + ": got dtype " +
                               std::to_string(dtype) + ", expected a flash_dmattn_dtype");
    }
  }
  Args args = valid;
  args.causal = 2;
  expect_invalid(args, "flash_dmattn::" + function + ": causal: got 2, expected 0 or 1");
}

#define FIELD(name) {#name, &Args::name}

TEST(CApi, UnknownTypesAreRefusedInEveryTensor) {
  const Calls calls;
  {
    using Args = flash_dmattn_select_args;
    check_fields<Args>("select", calls.select, {FIELD(score), FIELD(cu_seqlens), FIELD(expiry)});
  }
  {
    using Args = flash_dmattn_plan_args;
    check_fields<Args>("plan", calls.plan,
                       {FIELD(expiry), FIELD(score), FIELD(bias), FIELD(mask), FIELD(cu_seqlens_q),
                        FIELD(cu_seqlens_k), FIELD(plan)});
  }
  {
    using Args = flash_dmattn_forward_args;
    check_fields<Args>(
        "forward", calls.forward,
        {FIELD(query), FIELD(key), FIELD(value), FIELD(bias), FIELD(mask), FIELD(expiry), FIELD(score),
         FIELD(plan), FIELD(cu_seqlens_q), FIELD(cu_seqlens_k), FIELD(out), FIELD(lse)});
  }
  {
    using Args = flash_dmattn_backward_args;
    check_fields<Args>("backward", calls.backward,
                       {FIELD(query), FIELD(key), FIELD(value), FIELD(bias), FIELD(mask), FIELD(expiry),
                        FIELD(score), FIELD(plan), FIELD(cu_seqlens_q), FIELD(cu_seqlens_k), FIELD(out),
                        FIELD(lse), FIELD(dout), FIELD(dlse), FIELD(dq), FIELD(dk), FIELD(dv), FIELD(dbias)});
  }
}

#undef FIELD

// The C++ interface refuses in its own words, whatever the rank.
TEST(CApi, MessagesOfTheLibraryPassThrough) {
  Calls calls;
  calls.select.num_sinks = -1;
  expect_invalid(calls.select, "flash_dmattn::select: num_sinks: got -1, expected at least 0");
  calls.select = Calls().select;
  calls.select.local_window = -3;
  expect_invalid(calls.select, "flash_dmattn::select: local_window: got -3, expected at least 0");
  calls.select.local_window = 0;
  calls.select.num_queries = 6;
  expect_invalid(calls.select,
                 "flash_dmattn::select: num_queries: got 6, expected 0 to Sk = 5, or -1 for all");
  for (const int rank : {-1, 5, std::numeric_limits<int>::max(), std::numeric_limits<int>::min()}) {
    Calls other;
    other.forward.lse.rank = rank;
    expect_invalid(other.forward, "flash_dmattn::forward: lse: got rank " + std::to_string(rank) +
                                      ", expected [B, H, Sq] with B = 1, H = 1, Sq = 3");
  }
  calls.plan.keep_window = -2;
  expect_invalid(calls.plan, "flash_dmattn::plan: keep_window: got -2, expected at least 0");
  calls.forward.scale = std::numeric_limits<double>::infinity();
  expect_invalid(calls.forward, "flash_dmattn::forward: scale: got inf, expected a finite number");
  calls.backward.keep_window = -2;
  expect_invalid(calls.backward, "flash_dmattn::backward: keep_window: got -2, expected at least 0");
}

// The struct as another version has it, in memory of exactly its size.
template <typename Args>
std::unique_ptr<unsigned char[]> resized(Args args, std::uint64_t size) {
  args.struct_size = size;
  auto memory = std::make_unique<unsigned char[]>(size);
  std::memcpy(memory.get(), &args, std::min<std::size_t>(size, sizeof(args)));
  return memory;
}

template <typename Args>
const Args* as(const std::unique_ptr<unsigned char[]>& memory) {
  return reinterpret_cast<const Args*>(memory.get());
}

TEST(CApi, AShorterStructIsReadAsIfZerosFollowed) {
  const Calls calls;
  using Args = flash_dmattn_select_args;
  Args args = calls.select;
  args.num_sinks = args.local_window = args.num_queries = -7;  // not within the struct_size below
  const auto memory = resized(args, offsetof(Args, num_sinks));
  EXPECT_EQ(run_in_workspace(*as<Args>(memory)), FLASH_DMATTN_OK) << error();
  const std::vector<unsigned char> got = calls.expiry.elements();
  EXPECT_EQ(run_in_workspace(calls.select), FLASH_DMATTN_OK) << error();
  EXPECT_EQ(got, calls.expiry.elements());

  const auto no_fields = resized(calls.forward, 8);
  expect_invalid(*as<flash_dmattn_forward_args>(no_fields),
                 "flash_dmattn::forward: query: got no tensor, expected [B, Sq, H, D]");
  const auto cpu = resized(flash_dmattn_target{}, 16);
  EXPECT_EQ(run_in_workspace(calls.select, as<flash_dmattn_target>(cpu)), FLASH_DMATTN_OK) << error();
}

TEST(CApi, ALongerStructHoldsZerosThatAreUnknown) {
  const Calls calls;
  const auto check = [&](const auto& args, const std::string& function) {
    using Args = std::decay_t<decltype(args)>;
    for (const std::size_t more : {std::size_t{8}, std::size_t{80}, 65536 - sizeof(Args)}) {
      const auto memory = resized(args, sizeof(Args) + more);
      std::size_t bytes = 0;
      EXPECT_EQ(c_workspace_bytes(as<Args>(memory), nullptr, &bytes),
                function == "plan" ? FLASH_DMATTN_UNSUPPORTED : FLASH_DMATTN_OK)
          << error();
      for (const std::size_t at : {sizeof(Args), sizeof(Args) + more - 1}) {
        memory[at] = 1;
        expect_invalid(*as<Args>(memory),
                       "flash_dmattn::" + function + ": args: got fields beyond the first " +
                           std::to_string(sizeof(Args)) + " bytes, expected zeros there, which version " +
                           version() + " does not know");
        memory[at] = 0;
      }
    }
    for (const std::uint64_t size :
         {std::uint64_t{0}, std::uint64_t{4}, std::uint64_t{12}, std::uint64_t{sizeof(Args) + 1},
          std::uint64_t{65544}, ~std::uint64_t{0}}) {
      Args wrong = args;
      wrong.struct_size = size;
      expect_invalid(wrong, "flash_dmattn::" + function + ": args: got struct_size " + std::to_string(size) +
                                ", expected the size of the struct, " + std::to_string(sizeof(Args)));
    }
    expect_refused(static_cast<const Args*>(nullptr), nullptr, FLASH_DMATTN_INVALID_ARGUMENT,
                   "flash_dmattn::" + function + ": args: got a null pointer, expected a struct");
  };
  check(calls.select, "select");
  check(calls.plan, "plan");
  check(calls.forward, "forward");
  check(calls.backward, "backward");

  flash_dmattn_target target = to_c(Target{});
  target.struct_size = 0;
  expect_invalid(calls.select,
                 "flash_dmattn::select: target: got struct_size 0, expected the size of the struct, 48",
                 &target);
  const auto memory = resized(to_c(Target{}), 56);
  memory[48] = 1;
  expect_invalid(
      calls.select,
      std::string("flash_dmattn::select: target: got fields beyond the first 48 bytes, expected zeros "
                  "there, which version ") +
          version() + " does not know",
      as<flash_dmattn_target>(memory));
}

TEST(CApi, Targets) {
  const Calls calls;
  const auto refused = [&](flash_dmattn_target target, const std::string& message) {
    expect_invalid(calls.select, "flash_dmattn::select: " + message, &target);
  };
  const flash_dmattn_target valid = to_c(threads(2));
  flash_dmattn_target target = valid;
  target.device_type = 2;
  refused(target, "target.device_type: got 2, expected a flash_dmattn_device_type");
  target.device_type = 256;
  refused(target, "target.device_type: got 256, expected a flash_dmattn_device_type");
  target = valid;
  for (const std::int64_t workers : {std::int64_t{0}, std::int64_t{-1}, kMax, std::int64_t{1} << 32}) {
    target.num_workers = workers;
    refused(target, "target.num_workers: got " + std::to_string(workers) + ", expected at least 1");
  }
  target.num_workers = 65537;
  refused(target, "parallel_for.num_workers: got 65537, expected 1 to 65536");
  target.parallel_for = nullptr;
  for (const std::int64_t workers : {2, -1}) {
    target.num_workers = workers;
    refused(target,
            "target.num_workers: got " + std::to_string(workers) + " without parallel_for, expected 0 or 1");
  }
  for (const std::int64_t workers : {0, 1}) {
    target.num_workers = workers;
    EXPECT_EQ(run_in_workspace(calls.select, &target), FLASH_DMATTN_OK) << error();
  }

  target = to_c(Target{.device_type = DeviceType::kCuda, .device_index = -1});
  refused(target, "device_index: got -1, expected at least 0");
  target.device_index = 0;
  expect_refused(
      &calls.select, &target, FLASH_DMATTN_UNSUPPORTED,
      "flash_dmattn::select: no kernel can run: cpu: takes tensors in host memory; this build has no CUDA "
      "kernels");
  expect_refused(&calls.plan, &target, FLASH_DMATTN_UNSUPPORTED,
                 "flash_dmattn::plan: no kernel can run: this build has no CUDA kernels");
}

// Through C and through C++ a call gives the same bits; with the caller's threads, too.
TEST(CApi, ResultsAreThoseOfTheCppInterface) {
  Random random(11);
  for (int n = 0; n < 15 && !HasFailure(); ++n) {
    const Case c = random_case(random);
    SCOPED_TRACE(describe(c));
    const Problem problem(c, static_cast<std::uint64_t>(n));
    const Outputs want = run_case(problem, expect(problem));
    const Tensor out = problem.like_query(), lse = problem.like_lse();
    ForwardArgs args = problem.forward_args();
    args.out = out.view();
    args.lse = lse.view();
    const flash_dmattn_target target = to_c(threads(3));
    EXPECT_EQ(run_in_workspace(to_c(args), &target), FLASH_DMATTN_OK) << error();
    EXPECT_EQ(out.bytes(), want.out.bytes());
    EXPECT_EQ(lse.bytes(), want.lse.bytes());

    BackwardArgs backward_args = problem.backward_args();
    backward_args.out = out.view();
    backward_args.lse = lse.view();
    const auto gradients_of = [&] {
      Gradients gradients = {problem.like_query(), problem.like_key(), problem.like_key(),
                             problem.like_bias()};
      backward_args.dq = gradients.dq.view();
      backward_args.dk = gradients.dk.view();
      backward_args.dv = gradients.dv.view();
      if (problem.has_bias()) backward_args.dbias = gradients.dbias.view();
      return gradients;
    };
    const Gradients wanted = gradients_of();
    run(backward, backward_args);
    const Gradients got = gradients_of();
    EXPECT_EQ(run_in_workspace(to_c(backward_args), &target), FLASH_DMATTN_OK) << error();
    EXPECT_EQ(got.dq.bytes(), wanted.dq.bytes());
    EXPECT_EQ(got.dk.bytes(), wanted.dk.bytes());
    EXPECT_EQ(got.dv.bytes(), wanted.dv.bytes());
    EXPECT_EQ(got.dbias.bytes(), wanted.dbias.bytes());
    EXPECT_TRUE(problem.inputs_unchanged());
  }
}

// A row that sees one key copies its value, whatever the bias.
TEST(CApi, MasksAndDenseBiases) {
  constexpr std::int64_t kRows = 5;
  const Problem problem({.sequences = {{kRows, kRows}}, .bias = false}, 2);
  Tensor bias(DType::kFloat32, {1, 1, kRows, kRows}), dbias(DType::kFloat32, {1, 1, kRows, kRows});
  std::vector<unsigned char> mask(kRows * kRows, 0);
  for (std::int64_t i = 0; i < kRows; ++i) mask[static_cast<std::size_t>(i * kRows + i)] = 1;
  bias.for_each([&](const Index& index) { bias.set(index, static_cast<double>(index[2] - index[3])); });
  const Tensor out = problem.like_query(), lse = problem.like_lse();
  ForwardArgs args = problem.forward_args();
  args.bias = bias.view();
  args.mask = contiguous_view(mask.data(), DType::kBool, {1, 1, kRows, kRows});
  args.out = out.view();
  args.lse = lse.view();
  EXPECT_EQ(run_in_workspace(to_c(args)), FLASH_DMATTN_OK) << error();
  EXPECT_EQ(out.elements(), problem.value.elements());

  BackwardArgs backward_args = problem.backward_args();
  backward_args.bias = args.bias;
  backward_args.mask = args.mask;
  backward_args.out = args.out;
  backward_args.lse = args.lse;
  backward_args.dbias = dbias.view();
  EXPECT_EQ(run_in_workspace(to_c(backward_args)), FLASH_DMATTN_OK) << error();
  dbias.for_each([&](const Index& index) {
    // P (dP - delta) with P 1 and dP the product of dout and out: what remains of delta is dlse.
    const bool seen = index[2] == index[3];
    EXPECT_NEAR(dbias.get(index), seen ? problem.dlse.get({0, 0, index[2]}) : 0, seen ? 1e-4 : 0);
  });
}

TEST(CApi, SelectPassesEveryNumber) {
  Random random(5);
  Tensor score(DType::kFloat32, {1, 2, 60}), want(DType::kInt32, {1, 2, 60}), got(DType::kInt32, {1, 2, 60});
  score.fill([&] { return random.normal(); });
  for (const SelectArgs& numbers :
       {SelectArgs{.keep_window = 7, .causal = false}, SelectArgs{.keep_window = 3, .num_sinks = 2},
        SelectArgs{.keep_window = 3, .local_window = 9}, SelectArgs{.keep_window = 4, .num_queries = 11}}) {
    SelectArgs args = numbers;
    args.score = score.view();
    args.expiry = want.view();
    run(select, args);
    args.expiry = got.view();
    EXPECT_EQ(run_in_workspace(to_c(args)), FLASH_DMATTN_OK) << error();
    EXPECT_EQ(got.bytes(), want.bytes());
    if (numbers.num_queries != -1) continue;
    flash_dmattn_select_args all = to_c(args);
    all.num_queries = 0;
    EXPECT_EQ(run_in_workspace(all), FLASH_DMATTN_OK) << error();
    EXPECT_EQ(got.bytes(), want.bytes());
  }
}

TEST(CApi, ParallelForGetsItsContext) {
  const Calls calls;
  struct Seen {
    int calls = 0, workers = 0;
  } seen;
  Tensor score(DType::kFloat32, {1, 8, 40}), expiry(DType::kInt32, {1, 8, 40});
  score.fill([] { return 1.0; });
  flash_dmattn_select_args args = calls.select;
  args.score = to_c(score.view());
  args.expiry = to_c(expiry.view());
  flash_dmattn_target target = to_c(Target{});
  target.context = &seen;
  target.num_workers = 5;
  target.parallel_for = [](void* context, int workers, flash_dmattn_body body, void* state) {
    auto& seen = *static_cast<Seen*>(context);
    ++seen.calls;
    seen.workers = workers;
    for (int worker = 0; worker < workers; ++worker) body(state, worker);
  };
  EXPECT_EQ(run_in_workspace(args, &target), FLASH_DMATTN_OK) << error();
  EXPECT_GE(seen.calls, 1);
  EXPECT_EQ(seen.workers, 5);

  target.parallel_for = [](void*, int, flash_dmattn_body, void*) {
    throw std::runtime_error("of the caller");
  };
  EXPECT_EQ(run_in_workspace(args, &target), FLASH_DMATTN_EXCEPTION);
  EXPECT_EQ(error(), "flash_dmattn::select: parallel_for ended with an exception");
}

TEST(CApi, NoMemoryForAMessage) {
  Calls calls;
  calls.forward.key = {};
  std::size_t bytes = 1;
  char text[8];
  memory_is_out = true;
  const flash_dmattn_status refused = c_run(&calls.forward, nullptr, nullptr, 0);
  const flash_dmattn_status measured = c_workspace_bytes(&calls.forward, nullptr, &bytes);
  const flash_dmattn_status explained =
      flash_dmattn_explain_forward(&calls.forward, nullptr, text, 8, nullptr);
  memory_is_out = false;
  EXPECT_EQ(refused, FLASH_DMATTN_OUT_OF_MEMORY);
  EXPECT_EQ(measured, FLASH_DMATTN_OUT_OF_MEMORY);
  EXPECT_EQ(explained, FLASH_DMATTN_OUT_OF_MEMORY);
  EXPECT_EQ(bytes, 0u);
  EXPECT_STREQ(text, "");
  EXPECT_EQ(error(), "flash_dmattn::forward: got no memory for a message or text");
}

// A call that is not refused asks for no memory.
TEST(CApi, ValidCallsAllocateNothing) {
  const Calls calls;
  flash_dmattn_select_args many = calls.select;
  many.keep_window = many.num_sinks = many.local_window = kMax;
  std::vector<unsigned char> memory(1 << 22);
  memory_is_out = true;
  const bool all = c_run(&calls.select, nullptr, memory.data(), memory.size()) == FLASH_DMATTN_OK &&
                   c_run(&many, nullptr, memory.data(), memory.size()) == FLASH_DMATTN_OK &&
                   c_run(&calls.forward, nullptr, memory.data(), memory.size()) == FLASH_DMATTN_OK &&
                   c_run(&calls.backward, nullptr, memory.data(), memory.size()) == FLASH_DMATTN_OK;
  memory_is_out = false;
  EXPECT_TRUE(all) << error();
}

TEST(CApi, Texts) {
  const Calls calls;
  std::size_t length = 0;
  char text[64] = "before";
  ForwardArgs args = calls.problem.forward_args();
  args.out = calls.out.view();
  args.lse = calls.lse.view();
  EXPECT_EQ(flash_dmattn_explain_forward(&calls.forward, nullptr, text, sizeof(text), &length),
            FLASH_DMATTN_OK);
  EXPECT_EQ(text, explain(args, Target{}));
  EXPECT_EQ(length, explain(args, Target{}).size());
  EXPECT_EQ(flash_dmattn_explain_backward(&calls.backward, nullptr, text, 5, &length), FLASH_DMATTN_OK);
  EXPECT_STREQ(text, "cpu:");
  EXPECT_EQ(length, 9u);
  EXPECT_EQ(flash_dmattn_explain_backward(&calls.backward, nullptr, nullptr, 0, &length), FLASH_DMATTN_OK);
  EXPECT_EQ(length, 9u);
  EXPECT_EQ(flash_dmattn_explain_forward(&calls.forward, nullptr, nullptr, 1, &length),
            FLASH_DMATTN_INVALID_ARGUMENT);
  EXPECT_EQ(error(), "flash_dmattn::forward: text: got a null pointer, expected 1 bytes of memory");
  EXPECT_EQ(length, 0u);
  EXPECT_EQ(flash_dmattn_explain_forward(nullptr, nullptr, text, sizeof(text), &length),
            FLASH_DMATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(text, "");

  // Why not is a text, and no error.
  flash_dmattn_forward_args refused = calls.forward;
  refused.key = {};
  EXPECT_EQ(flash_dmattn_explain_forward(&refused, nullptr, text, sizeof(text), nullptr), FLASH_DMATTN_OK);
  EXPECT_EQ(std::string(text).substr(0, 35), "flash_dmattn::forward: key: got no ");

  EXPECT_EQ(flash_dmattn_describe_build(text, sizeof(text), &length), FLASH_DMATTN_OK);
  EXPECT_EQ(text, describe_build());
  EXPECT_EQ(length, describe_build().size());
  EXPECT_EQ(flash_dmattn_describe_build(nullptr, 3, &length), FLASH_DMATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_dmattn_version(), version());
}

TEST(CApi, TheSizeToReturnNeedsMemory) {
  const Calls calls;
  const std::string message = ": the size to return: got a null pointer, expected memory for it";
  EXPECT_EQ(c_workspace_bytes(&calls.select, nullptr, nullptr), FLASH_DMATTN_INVALID_ARGUMENT);
  EXPECT_EQ(error(), "flash_dmattn::select" + message);
  EXPECT_EQ(flash_dmattn_plan_elements(&calls.plan, nullptr, nullptr), FLASH_DMATTN_INVALID_ARGUMENT);
  EXPECT_EQ(error(), "flash_dmattn::plan" + message);
  std::size_t elements = 1;
  EXPECT_EQ(flash_dmattn_plan_elements(&calls.plan, nullptr, &elements), FLASH_DMATTN_UNSUPPORTED);
  EXPECT_EQ(elements, 0u);
}

// Sizes are those of the C++ interface, 0 where nothing is needed.
TEST(CApi, WorkspaceBytes) {
  const Calls calls;
  std::size_t bytes = 0;
  EXPECT_EQ(c_workspace_bytes(&calls.forward, nullptr, &bytes), FLASH_DMATTN_OK);
  ForwardArgs args = calls.problem.forward_args();
  args.out = calls.out.view();
  EXPECT_EQ(bytes, workspace_bytes(args, Target{}));
  std::vector<unsigned char> memory(bytes);
  EXPECT_EQ(c_run(&calls.forward, nullptr, memory.data(), bytes - 1), FLASH_DMATTN_INVALID_ARGUMENT);
  EXPECT_EQ(error(), "flash_dmattn::forward: workspace: got " + std::to_string(bytes - 1) +
                         " bytes, expected at least " + std::to_string(bytes) + ", as workspace_bytes says");

  flash_dmattn_select_args select = calls.select;
  select.keep_window = 5;  // all keys: no heap
  EXPECT_EQ(c_workspace_bytes(&select, nullptr, &bytes), FLASH_DMATTN_OK);
  EXPECT_EQ(bytes, 0u);
  EXPECT_EQ(error(), "");
  EXPECT_EQ(c_run(&select, nullptr, nullptr, 0), FLASH_DMATTN_OK) << error();
}

// The message is that of the last call, of the thread that asks.
TEST(CApi, EveryThreadHasItsMessage) {
  std::atomic<int> arrived{0};
  const auto meet = [&](int count) {
    ++arrived;
    while (arrived < count) std::this_thread::yield();
  };
  std::string first, second, untouched = "?";
  std::thread thread([&] {
    untouched = error();
    Calls calls;
    calls.select.keep_window = -1;
    EXPECT_EQ(run_in_workspace(calls.select), FLASH_DMATTN_INVALID_ARGUMENT);
    meet(2);
    meet(4);
    first = error();
  });
  Calls calls;
  meet(2);
  calls.forward.keep_window = -2;
  EXPECT_EQ(run_in_workspace(calls.forward), FLASH_DMATTN_INVALID_ARGUMENT);
  meet(4);
  second = error();
  thread.join();
  EXPECT_EQ(untouched, "");
  EXPECT_EQ(first, "flash_dmattn::select: keep_window: got -1, expected at least 1");
  EXPECT_EQ(second, "flash_dmattn::forward: keep_window: got -2, expected at least 0");

  EXPECT_EQ(run_in_workspace(calls.select), FLASH_DMATTN_OK);
  EXPECT_EQ(error(), "");
}

}  // namespace
}  // namespace flash_dmattn::testing
