/* The library as plain C99, for C, ctypes, JAX, Rust and whatever else calls C. What the functions compute,
 * the shapes and every precondition are those of flash_dmattn/attention.h; docs/c_api.md has an example.
 *
 * Structs. A struct begins with struct_size: set it to sizeof the struct, and to zero what you do not need.
 * Later versions append fields. A shorter struct, of a caller compiled against an older header, is read as if
 * zeros followed; a longer one is refused if what the library does not know is not zero. A zero is absent,
 * false or the default.
 *
 * Errors. Functions return a status, FLASH_DMATTN_OK or why not, and leave a message for
 * flash_dmattn_last_error(). A refused call reads and writes nothing but the size it was to return, which it
 * sets to 0. No exception crosses this interface, and there is no state but the message, one per thread: any
 * number of threads may call at the same time. */
#ifndef FLASH_DMATTN_C_API_H_
#define FLASH_DMATTN_C_API_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flash_dmattn_status {
  FLASH_DMATTN_OK = 0,
  FLASH_DMATTN_INVALID_ARGUMENT = 1,
  FLASH_DMATTN_UNSUPPORTED = 2, /* valid, but no kernel of this build can run it */
  FLASH_DMATTN_DEVICE_ERROR = 3,
  FLASH_DMATTN_OUT_OF_MEMORY = 4, /* for a message or a text; the computation itself allocates nothing */
  FLASH_DMATTN_EXCEPTION = 5      /* parallel_for threw; the outputs are undefined */
} flash_dmattn_status;

typedef enum flash_dmattn_dtype {
  FLASH_DMATTN_FLOAT64 = 1,
  FLASH_DMATTN_FLOAT32 = 2,
  FLASH_DMATTN_FLOAT16 = 3,
  FLASH_DMATTN_BFLOAT16 = 4,
  FLASH_DMATTN_INT32 = 5,
  FLASH_DMATTN_BOOL = 6 /* one byte, 0 is false and all else true */
} flash_dmattn_dtype;

typedef enum flash_dmattn_device_type {
  FLASH_DMATTN_DEVICE_CPU = 0,
  FLASH_DMATTN_DEVICE_CUDA = 1
} flash_dmattn_device_type;

#define FLASH_DMATTN_MAX_RANK 4

/* Owns nothing. */
typedef struct flash_dmattn_tensor {
  void* data;    /* inputs are only read, although the pointer is not const */
  int32_t dtype; /* flash_dmattn_dtype */
  int32_t rank;  /* 0: the tensor is absent */
  int64_t shape[FLASH_DMATTN_MAX_RANK];
  int64_t strides[FLASH_DMATTN_MAX_RANK]; /* in elements; 0 repeats, negative runs backwards */
} flash_dmattn_tensor;

/* Runs body(state, worker) once for every worker in [0, num_workers) and returns when all have returned: at
 * the same time or one after the other, on any threads. Results do not depend on it, bit for bit. */
typedef void (*flash_dmattn_body)(void* state, int worker);
typedef void (*flash_dmattn_parallel_for)(void* context, int num_workers, flash_dmattn_body body,
                                          void* state);

/* Where and how a call runs. NULL in its place: the CPU, in the calling thread. */
typedef struct flash_dmattn_target {
  uint64_t struct_size;
  int32_t device_type;                    /* flash_dmattn_device_type */
  int32_t device_index;                   /* CUDA: as the CUDA runtime counts */
  void* stream;                           /* CUDA: the cudaStream_t that the work is queued on */
  flash_dmattn_parallel_for parallel_for; /* CPU; NULL: the calling thread alone */
  void* context;                          /* for parallel_for */
  int64_t num_workers;                    /* with parallel_for: at least 1; workspaces grow with it */
} flash_dmattn_target;

typedef struct flash_dmattn_select_args {
  uint64_t struct_size;
  flash_dmattn_tensor score;
  flash_dmattn_tensor cu_seqlens; /* optional */
  flash_dmattn_tensor expiry;     /* out */
  int64_t keep_window;
  int64_t causal; /* 0 or 1 */
  int64_t num_sinks;
  int64_t local_window;
  int64_t num_queries; /* the rows that will read expiry, the last ones; 0 or -1: all */
} flash_dmattn_select_args;

typedef struct flash_dmattn_plan_args {
  uint64_t struct_size;
  flash_dmattn_tensor expiry, score, bias;        /* optional, but one of expiry, bias and mask */
  flash_dmattn_tensor cu_seqlens_q, cu_seqlens_k; /* optional */
  flash_dmattn_tensor plan;                       /* out */
  int64_t num_queries;
  int64_t keep_window;
  int64_t causal;           /* 0 or 1 */
  flash_dmattn_tensor mask; /* optional */
} flash_dmattn_plan_args;

typedef struct flash_dmattn_forward_args {
  uint64_t struct_size;
  flash_dmattn_tensor query, key, value;
  flash_dmattn_tensor bias, mask, expiry, score; /* optional */
  int64_t keep_window;
  flash_dmattn_tensor plan, cu_seqlens_q, cu_seqlens_k; /* optional */
  flash_dmattn_tensor out;                              /* out */
  flash_dmattn_tensor lse;                              /* out, optional */
  double scale;
  int64_t causal; /* 0 or 1 */
} flash_dmattn_forward_args;

typedef struct flash_dmattn_backward_args {
  uint64_t struct_size;
  flash_dmattn_tensor query, key, value;
  flash_dmattn_tensor bias, mask, expiry, score; /* optional */
  int64_t keep_window;
  flash_dmattn_tensor plan, cu_seqlens_q, cu_seqlens_k; /* optional */
  flash_dmattn_tensor out, lse, dout;
  flash_dmattn_tensor dlse;              /* optional */
  flash_dmattn_tensor dq, dk, dv, dbias; /* out, optional: an absent one is not computed */
  double scale;
  int64_t causal; /* 0 or 1 */
} flash_dmattn_backward_args;

/* The bytes of workspace that a call with these arguments needs, or why it would be refused. */
flash_dmattn_status flash_dmattn_select_workspace_bytes(const flash_dmattn_select_args* args,
                                                        const flash_dmattn_target* target, size_t* bytes);
flash_dmattn_status flash_dmattn_plan_workspace_bytes(const flash_dmattn_plan_args* args,
                                                      const flash_dmattn_target* target, size_t* bytes);
flash_dmattn_status flash_dmattn_forward_workspace_bytes(const flash_dmattn_forward_args* args,
                                                         const flash_dmattn_target* target, size_t* bytes);
flash_dmattn_status flash_dmattn_backward_workspace_bytes(const flash_dmattn_backward_args* args,
                                                          const flash_dmattn_target* target, size_t* bytes);

/* The number of elements of the plan; args->plan may be absent. */
flash_dmattn_status flash_dmattn_plan_elements(const flash_dmattn_plan_args* args,
                                               const flash_dmattn_target* target, size_t* elements);

/* workspace: that many bytes on the target's device, or NULL for none. It needs no initialisation. */
flash_dmattn_status flash_dmattn_select(const flash_dmattn_select_args* args,
                                        const flash_dmattn_target* target, void* workspace,
                                        size_t workspace_bytes);
flash_dmattn_status flash_dmattn_plan(const flash_dmattn_plan_args* args, const flash_dmattn_target* target,
                                      void* workspace, size_t workspace_bytes);
flash_dmattn_status flash_dmattn_forward(const flash_dmattn_forward_args* args,
                                         const flash_dmattn_target* target, void* workspace,
                                         size_t workspace_bytes);
flash_dmattn_status flash_dmattn_backward(const flash_dmattn_backward_args* args,
                                          const flash_dmattn_target* target, void* workspace,
                                          size_t workspace_bytes);

/* Texts are stored like snprintf does: cut to `capacity` bytes with the final 0 among them, `length` (or
 * NULL) without it and as if uncut; text may be NULL where capacity is 0.
 *
 * One line per kernel that could serve the call, first choice first: "<name>: runs" or "<name>: <why not>".
 */
flash_dmattn_status flash_dmattn_explain_forward(const flash_dmattn_forward_args* args,
                                                 const flash_dmattn_target* target, char* text,
                                                 size_t capacity, size_t* length);
flash_dmattn_status flash_dmattn_explain_backward(const flash_dmattn_backward_args* args,
                                                  const flash_dmattn_target* target, char* text,
                                                  size_t capacity, size_t* length);
/* What this build runs on: "cpu (AVX2); cuda (sm_80, PTX)". */
flash_dmattn_status flash_dmattn_describe_build(char* text, size_t capacity, size_t* length);

/* "1.2.3" */
const char* flash_dmattn_version(void);

/* Why this thread's last call that returned a status was refused, "" if it was not: the function, the
 * argument, what it got and what is accepted, cut to 2047 bytes. Valid until the thread's next such call. */
const char* flash_dmattn_last_error(void);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_DMATTN_C_API_H_ */
