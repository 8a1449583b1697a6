// Calls with wrong arguments: a valid call of any pass, of which the input spoils some fields. Whatever they
// are, nothing is read or written that a tensor does not own, and every entry of the pass says the same.
// Where memory for a tensor cannot be had, its pointer leads to memory that may not be touched. A call that
// is not refused runs, if all its tensors have memory of exactly their extent.
#include <sys/mman.h>

#include <array>
#include <memory>
#include <vector>

#include "c_args.h"
#include "fuzz_input.h"

namespace flash_dmattn::testing {
namespace {

constexpr std::int64_t kMostBytes = 1 << 16;  // of a tensor that gets memory
constexpr std::int64_t kMostWork = 1 << 18;   // pairs of elements of a call that runs
constexpr std::size_t kMostWorkspace = 1 << 26;

// The tensors of a struct as an array: first, last and the number between them in the header have no gaps but
// 8-byte numbers.
struct Field {
  flash_dmattn_tensor* tensor;
  bool is_offsets = false;
};

std::vector<Field> fields(flash_dmattn_select_args& a) {
  return {{&a.score}, {&a.cu_seqlens, true}, {&a.expiry}};
}
std::vector<Field> fields(flash_dmattn_plan_args& a) {
  return {{&a.expiry}, {&a.score}, {&a.bias}, {&a.cu_seqlens_q, true}, {&a.cu_seqlens_k, true}, {&a.plan}};
}
template <typename Args>
std::vector<Field> attention_fields(Args& a) {
  return {{&a.query},
          {&a.key},
          {&a.value},
          {&a.bias},
          {&a.mask},
          {&a.expiry},
          {&a.score},
          {&a.plan},
          {&a.cu_seqlens_q, true},
          {&a.cu_seqlens_k, true},
          {&a.out},
          {&a.lse}};
}
std::vector<Field> fields(flash_dmattn_forward_args& a) { return attention_fields(a); }
std::vector<Field> fields(flash_dmattn_backward_args& a) {
  std::vector<Field> result = attention_fields(a);
  for (flash_dmattn_tensor* tensor : {&a.dout, &a.dlse, &a.dq, &a.dk, &a.dv, &a.dbias})
    result.push_back({tensor});
  return result;
}

struct Sizes {
  explicit Sizes(Input& input) {
    packed = input.chance(80);
    causal = !input.chance(80);
    batch = 1 + input.below(3);
    seqlen_q = input.below(7);
    seqlen_k = seqlen_q + input.below(5);
    heads_kv = 1 + input.below(3);
    heads_q = heads_kv * (input.chance(16) ? 0 : 1 + input.below(3));
    head_dim = 1 + input.below(18);
    dtype =
        input.pick({FLASH_DMATTN_FLOAT32, FLASH_DMATTN_FLOAT64, FLASH_DMATTN_FLOAT16, FLASH_DMATTN_BFLOAT16});
    accumulation = dtype == FLASH_DMATTN_FLOAT64 ? FLASH_DMATTN_FLOAT64 : FLASH_DMATTN_FLOAT32;
  }

  bool packed, causal;
  std::int64_t batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim;
  flash_dmattn_dtype dtype, accumulation;
};

// Strides of one of the kinds that are valid for outputs, too.
flash_dmattn_tensor make_tensor(Input& input, int dtype, std::initializer_list<std::int64_t> shape) {
  flash_dmattn_tensor tensor{};
  tensor.dtype = dtype;
  for (const std::int64_t size : shape) tensor.shape[tensor.rank++] = size;
  const int gap = input.chance(32) ? 3 : 0, sign = input.chance(32) ? -1 : 1;
  std::int64_t step = gap > 0 ? 2 : 1;
  for (int axis = tensor.rank - 1; axis >= 0; --axis) {
    tensor.strides[axis] = sign * step;
    step = step * std::max<std::int64_t>(tensor.shape[axis], 1) + gap;
  }
  return tensor;
}

struct Maker {
  Input& input;
  const Sizes& sizes;

  flash_dmattn_tensor q_rows() const {
    const Sizes& s = sizes;
    return s.packed ? make_tensor(input, s.dtype, {s.batch * s.seqlen_q, s.heads_q, s.head_dim})
                    : make_tensor(input, s.dtype, {s.batch, s.seqlen_q, s.heads_q, s.head_dim});
  }
  flash_dmattn_tensor k_rows() const {
    const Sizes& s = sizes;
    return s.packed ? make_tensor(input, s.dtype, {s.batch * s.seqlen_k, s.heads_kv, s.head_dim})
                    : make_tensor(input, s.dtype, {s.batch, s.seqlen_k, s.heads_kv, s.head_dim});
  }
  flash_dmattn_tensor per_key(int dtype) const {
    const Sizes& s = sizes;
    return s.packed ? make_tensor(input, dtype, {s.batch * s.seqlen_k, s.heads_kv})
                    : make_tensor(input, dtype, {s.batch, s.heads_kv, s.seqlen_k});
  }
  flash_dmattn_tensor per_query() const {
    const Sizes& s = sizes;
    return s.packed ? make_tensor(input, s.accumulation, {s.heads_q, s.batch * s.seqlen_q})
                    : make_tensor(input, s.accumulation, {s.batch, s.heads_q, s.seqlen_q});
  }
  flash_dmattn_tensor dense(int dtype) const {
    const Sizes& s = sizes;
    return make_tensor(input, dtype,
                       {input.chance(64) ? 1 : s.batch, input.pick({s.heads_q, s.heads_kv, std::int64_t{1}}),
                        input.chance(64) ? 1 : s.seqlen_q, s.seqlen_k});
  }
  flash_dmattn_tensor offsets() const {
    return sizes.packed ? make_tensor(input, FLASH_DMATTN_INT32, {sizes.batch + 1}) : flash_dmattn_tensor{};
  }
  flash_dmattn_tensor bias() const {
    if (input.chance(64)) return {};
    if (!input.chance(64)) return per_key(sizes.accumulation);
    return dense(input.pick({sizes.accumulation, FLASH_DMATTN_BFLOAT16, FLASH_DMATTN_FLOAT16}));
  }
};

void fill(const Maker& make, flash_dmattn_select_args& args) {
  args.score = make.per_key(make.sizes.dtype);
  args.cu_seqlens = make.offsets();
  args.expiry = make.per_key(FLASH_DMATTN_INT32);
  args.keep_window = 1 + make.input.below(12);
  args.causal = make.sizes.causal;
  args.num_sinks = make.input.below(3);
  args.local_window = make.sizes.causal ? make.input.below(3) : 0;
}

void fill(const Maker& make, flash_dmattn_plan_args& args) {
  args.expiry = make.per_key(FLASH_DMATTN_INT32);
  if (make.input.chance(128)) args.bias = make.per_key(FLASH_DMATTN_FLOAT32);
  args.cu_seqlens_q = make.offsets();
  args.cu_seqlens_k = make.offsets();
  args.num_queries = make.sizes.seqlen_q;
  args.causal = make.sizes.causal;
}

template <typename Args>
void fill_attention(const Maker& make, Args& args) {
  args.query = make.q_rows();
  args.key = make.k_rows();
  args.value = make.k_rows();
  args.bias = make.bias();
  if (make.input.chance(32)) args.mask = make.dense(FLASH_DMATTN_BOOL);
  if (!make.input.chance(64)) args.expiry = make.per_key(FLASH_DMATTN_INT32);
  if (args.expiry.rank != 0 && make.input.chance(32)) args.score = make.per_key(make.sizes.dtype);
  args.cu_seqlens_q = make.offsets();
  args.cu_seqlens_k = make.offsets();
  args.out = make.q_rows();
  args.lse = make.per_query();
  args.scale = 0.5;
  args.causal = make.sizes.causal;
}

void fill(const Maker& make, flash_dmattn_forward_args& args) { fill_attention(make, args); }

void fill(const Maker& make, flash_dmattn_backward_args& args) {
  fill_attention(make, args);
  args.dout = make.q_rows();
  if (make.input.chance(128)) args.dlse = make.per_query();
  if (!make.input.chance(64)) args.dq = make.q_rows();
  if (!make.input.chance(64)) args.dk = make.k_rows();
  if (!make.input.chance(64)) args.dv = make.k_rows();
  if (args.bias.rank != 0) args.dbias = args.bias;
}

void spoil_tensor(Input& input, flash_dmattn_tensor& tensor) {
  const int axis = input.below(4);
  switch (input.below(6)) {
    case 0:
      tensor.dtype = static_cast<std::int32_t>(input.number());
      break;
    case 1:
      tensor.rank = input.chance(64) ? static_cast<std::int32_t>(input.number()) : input.below(6);
      break;
    case 2:
      tensor.shape[axis] = input.number();
      break;
    case 3:
      tensor.strides[axis] = input.number();
      break;
    case 4:
      tensor.strides[axis] = 0;
      break;
    default:
      tensor.dtype = 1 + input.below(6);
  }
}

void spoil_number(Input& input, flash_dmattn_select_args& args) {
  for (std::int64_t* number :
       {&args.keep_window, &args.causal, &args.num_sinks, &args.local_window, &args.num_queries}) {
    if (input.chance(100)) *number = input.number();
  }
}
void spoil_number(Input& input, flash_dmattn_plan_args& args) {
  for (std::int64_t* number : {&args.num_queries, &args.keep_window, &args.causal}) {
    if (input.chance(100)) *number = input.number();
  }
}
template <typename Args>
void spoil_number(Input& input, Args& args) {
  for (std::int64_t* number : {&args.keep_window, &args.causal}) {
    if (input.chance(100)) *number = input.number();
  }
  if (input.chance(100)) args.scale = input.take<double>();
}

// Memory of the tensors of one call.
class Memory {
 public:
  bool all_owned = true;

  // Gives the tensor memory of exactly its extent; or an address that faults, or none.
  void place(Input& input, const Field& field, bool values_are_read) {
    flash_dmattn_tensor& tensor = *field.tensor;
    if (tensor.rank == 0) return;
    std::int64_t first = 0, count = 0;
    if (!extent(tensor, &first, &count)) {
      all_owned = false;
      tensor.data = field.is_offsets && values_are_read ? nullptr : untouchable();
      return;
    }
    const std::int64_t item = kItems[tensor.dtype - 1];
    auto& memory = blocks_.emplace_back(new unsigned char[static_cast<std::size_t>(count * item)]);
    sizes_.push_back(static_cast<std::size_t>(count * item));
    std::uint32_t state = input.take<std::uint16_t>();
    for (std::size_t i = 0; i < sizes_.back(); ++i) {
      state = state * 1664525u + 1013904223u;
      memory[i] = static_cast<unsigned char>(state >> 24);
    }
    tensor.data = count == 0 ? untouchable() : memory.get() + first * item;
  }

  // Cumulative lengths of equal sequences, from 0 to total.
  static void write_offsets(const flash_dmattn_tensor& tensor, std::int64_t total) {
    const std::int64_t length = tensor.shape[0];
    for (std::int64_t i = 0; i < length; ++i) {
      const auto offset = static_cast<std::int32_t>(length == 1 ? 0 : total / (length - 1) * i);
      std::memcpy(static_cast<unsigned char*>(tensor.data) + i * tensor.strides[0] * 4, &offset, 4);
    }
  }

  std::vector<std::vector<unsigned char>> contents() const {
    std::vector<std::vector<unsigned char>> result;
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      result.emplace_back(blocks_[i].get(), blocks_[i].get() + sizes_[i]);
    }
    return result;
  }

  // A new address every time, aligned for every type, in pages that can be neither read nor written.
  void* untouchable() {
    constexpr std::size_t kBytes = 1 << 16;
    static void* const pages = mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return static_cast<unsigned char*>(pages) + 64 * (1 + num_untouchable_++);
  }

 private:
  static constexpr std::array<std::int64_t, 6> kItems = {8, 4, 2, 2, 4, 1};

  // The offset of the first element from the lowest address, and the number of elements from lowest to
  // highest; false if the tensor has no extent or one too large.
  static bool extent(const flash_dmattn_tensor& tensor, std::int64_t* first, std::int64_t* count) {
    if (tensor.rank < 1 || tensor.rank > 4 || tensor.dtype < 1 || tensor.dtype > 6) return false;
    __int128 low = 0, high = 0, elements = 1;
    for (int axis = 0; axis < tensor.rank; ++axis) {
      if (tensor.shape[axis] < 0) return false;
      elements = elements > kMostBytes ? elements : elements * tensor.shape[axis];
      const __int128 reach = static_cast<__int128>(tensor.shape[axis] - 1) * tensor.strides[axis];
      (reach < 0 ? low : high) += reach;
    }
    for (int axis = 0; axis < tensor.rank; ++axis) {
      if (tensor.shape[axis] == 0) elements = 0;
    }
    *first = *count = 0;
    if (elements == 0) return true;
    if (elements > kMostBytes || high - low >= kMostBytes) return false;
    *first = static_cast<std::int64_t>(-low);
    *count = static_cast<std::int64_t>(high - low + 1);
    return true;
  }

  std::vector<std::unique_ptr<unsigned char[]>> blocks_;
  std::vector<std::size_t> sizes_;
  int num_untouchable_ = 0;
};

void run_in_turn(void* /*context*/, int num_workers, flash_dmattn_body body, void* state) {
  for (int worker = 0; worker < num_workers; ++worker) body(state, worker);
}

flash_dmattn_target make_target(Input& input) {
  flash_dmattn_target target{};
  target.struct_size = sizeof(target);
  if (input.chance(64)) {
    target.parallel_for = run_in_turn;
    target.num_workers = 1 + input.below(4);
  }
  if (input.chance(24)) target.device_type = FLASH_DMATTN_DEVICE_CUDA;
  if (input.chance(24)) {
    target.device_type = static_cast<std::int32_t>(input.number());
    target.device_index = static_cast<std::int32_t>(input.number());
    target.num_workers = input.number();
  }
  return target;
}

// The struct in memory of exactly its size, or of 8 bytes if it claims more than the library would believe.
template <typename Struct>
std::vector<std::uint64_t> versioned(Input& input, Struct from) {
  if (input.chance(16))
    from.struct_size = input.pick<std::uint64_t>({0, 8, 96, sizeof(from) - 8, sizeof(from) + 8, 4096});
  if (input.chance(8)) from.struct_size = static_cast<std::uint64_t>(input.number());
  const bool believable = from.struct_size <= 65536 && from.struct_size % 8 == 0 && from.struct_size > 0;
  std::vector<std::uint64_t> words(believable ? from.struct_size / 8 : 1, 0);
  std::memcpy(words.data(), &from, std::min(words.size() * 8, sizeof(from)));
  if (words.size() * 8 > sizeof(from) && input.chance(64)) words.back() = input.take<std::uint8_t>();
  return words;
}

// Of a tensor that has memory.
std::int64_t num_elements(const flash_dmattn_tensor& tensor) {
  std::int64_t count = tensor.rank == 0 ? 0 : 1;
  for (int axis = 0; axis < tensor.rank; ++axis) {
    if (tensor.shape[axis] == 0) return 0;
  }
  for (int axis = 0; axis < tensor.rank; ++axis) count *= tensor.shape[axis];
  return count;
}

template <typename Args>
flash_dmattn_status explain(const Args*, const flash_dmattn_target*, char*, std::size_t) {
  return FLASH_DMATTN_OK;
}
flash_dmattn_status explain(const flash_dmattn_forward_args* args, const flash_dmattn_target* target,
                            char* text, std::size_t capacity) {
  return flash_dmattn_explain_forward(args, target, text, capacity, nullptr);
}
flash_dmattn_status explain(const flash_dmattn_backward_args* args, const flash_dmattn_target* target,
                            char* text, std::size_t capacity) {
  return flash_dmattn_explain_backward(args, target, text, capacity, nullptr);
}

// The same answer from every entry; then the call itself, if it can run.
template <typename Args>
void call(const Args* args, const flash_dmattn_target* target, const Memory& memory, bool may_run) {
  const auto before = memory.contents();
  std::size_t bytes = 1;
  const flash_dmattn_status status = c_workspace_bytes(args, target, &bytes);
  const std::string message = flash_dmattn_last_error();
  require((status == FLASH_DMATTN_OK) == message.empty(), "status and message disagree");
  require(status <= FLASH_DMATTN_UNSUPPORTED, "status " + std::to_string(status) + ": " + message);
  require(message.empty() || message.rfind("flash_dmattn::", 0) == 0, "message: " + message);
  char text[16];
  explain(args, target, text, sizeof(text));
  if (status != FLASH_DMATTN_OK) {
    require(bytes == 0, "a size for a refused call");
    const flash_dmattn_status other = c_run(args, target, nullptr, 0);
    require(other == status && message == flash_dmattn_last_error(),
            "two refusals: " + message + "; " + flash_dmattn_last_error());
  } else if (bytes > 0) {
    require(c_run(args, target, nullptr, 0) == FLASH_DMATTN_INVALID_ARGUMENT, "ran without a workspace");
  }
  require(memory.contents() == before, "a refused call wrote");
  if (status != FLASH_DMATTN_OK || !may_run || !memory.all_owned || bytes > kMostWorkspace) return;
  const auto workspace = std::make_unique<unsigned char[]>(bytes);
  require(c_run(args, target, workspace.get(), bytes) == FLASH_DMATTN_OK, flash_dmattn_last_error());
}

template <typename Args>
void check_call(Input& input) {
  const Sizes sizes(input);
  Args args{};
  args.struct_size = sizeof(args);
  fill(Maker{input, sizes}, args);
  flash_dmattn_target target = make_target(input);
  const std::vector<Field> all = fields(args);
  for (int spoils = input.below(4); spoils > 0; --spoils) {
    spoil_tensor(input, *all[static_cast<std::size_t>(input.below(static_cast<int>(all.size())))].tensor);
  }
  if (input.chance(32)) spoil_number(input, args);

  Memory memory;
  const bool on_cpu = target.device_type != FLASH_DMATTN_DEVICE_CUDA;
  for (const Field& field : all) memory.place(input, field, on_cpu);
  for (const Field& field : all) {
    if (!field.is_offsets || !memory.all_owned || field.tensor->rank != 1 || input.chance(16)) continue;
    if (field.tensor->dtype != FLASH_DMATTN_INT32 || num_elements(*field.tensor) == 0) continue;
    const bool of_queries = field.tensor == all[8 % all.size()].tensor && all.size() > 8;
    Memory::write_offsets(*field.tensor, sizes.batch * (of_queries ? sizes.seqlen_q : sizes.seqlen_k));
  }
  for (const Field& field : all) {
    if (field.tensor->rank == 0 || !input.chance(4)) continue;
    auto& data = field.tensor->data;
    memory.all_owned = false;
    data = input.chance(128) ? nullptr : field.is_offsets ? data : static_cast<unsigned char*>(data) + 1;
  }

  std::int64_t largest = 0, work = 0;
  if (memory.all_owned) {
    for (const Field& field : all) {
      work = std::max(work, largest * num_elements(*field.tensor));
      largest = std::max(largest, num_elements(*field.tensor));
    }
  }
  const auto args_memory = versioned(input, args);
  const auto target_memory = versioned(input, target);
  const auto* target_or_null =
      input.chance(64) ? nullptr : reinterpret_cast<const flash_dmattn_target*>(target_memory.data());
  call(reinterpret_cast<const Args*>(args_memory.data()), target_or_null, memory,
       on_cpu && work <= kMostWork * 64);
}

}  // namespace
}  // namespace flash_dmattn::testing

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace flash_dmattn::testing;
  Input input(data, size);
  switch (input.below(8)) {
    case 0:
    case 1:
      check_call<flash_dmattn_select_args>(input);
      break;
    case 2:
      check_call<flash_dmattn_plan_args>(input);
      break;
    case 3:
    case 4:
      check_call<flash_dmattn_forward_args>(input);
      break;
    default:
      check_call<flash_dmattn_backward_args>(input);
  }
  return 0;
}
