/* Dynamic-mask attention from C: scores -> expiry -> attention and its gradients, each compared with the
 * definition. Build against an installed flash_dmattn:
 *
 *   cmake -S . -B build -DCMAKE_PREFIX_PATH=<prefix of flash_dmattn> && cmake --build build &&
 * build/attention */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "flash_dmattn/c_api.h"

enum { TOKENS = 40, HEADS = 2, HEAD_DIM = 8, WINDOW = 5 }; /* one key/value head, which both heads read */

typedef float Rows[TOKENS][HEADS][HEAD_DIM];
typedef float KeyRows[TOKENS][HEAD_DIM];
static Rows query, out, dout, dq;
static KeyRows key, value, dk, dv;
static float score[TOKENS], dscore[TOKENS], lse[HEADS][TOKENS];
static int32_t expiry[TOKENS];
static const double scale = 0.35;

static flash_dmattn_tensor tensor(void* data, flash_dmattn_dtype dtype, int rank, const int64_t* shape) {
  flash_dmattn_tensor result = {0};
  int64_t stride = 1;
  result.data = data;
  result.dtype = dtype;
  result.rank = rank;
  for (int axis = rank - 1; axis >= 0; --axis) {
    result.shape[axis] = shape[axis];
    result.strides[axis] = stride;
    stride *= shape[axis];
  }
  return result;
}

static flash_dmattn_tensor float_tensor(float* data, int rank, const int64_t* shape) {
  return tensor(data, FLASH_DMATTN_FLOAT32, rank, shape);
}

static void check(flash_dmattn_status status) {
  if (status == FLASH_DMATTN_OK) return;
  fprintf(stderr, "status %d: %s\n", (int)status, flash_dmattn_last_error());
  exit(1);
}

/* The library allocates nothing: a call runs in memory that the caller lends. */
static void* lend(size_t bytes) {
  void* memory = malloc(bytes > 0 ? bytes : 1);
  if (memory == NULL) exit(1);
  return memory;
}

static void run_library(void) {
  const int64_t query_shape[] = {1, TOKENS, HEADS, HEAD_DIM}, key_shape[] = {1, TOKENS, 1, HEAD_DIM};
  const int64_t score_shape[] = {1, 1, TOKENS}, lse_shape[] = {1, HEADS, TOKENS};
  size_t bytes;
  void* memory;

  const flash_dmattn_select_args select = {.struct_size = sizeof(select),
                                           .score = float_tensor(score, 3, score_shape),
                                           .expiry = tensor(expiry, FLASH_DMATTN_INT32, 3, score_shape),
                                           .keep_window = WINDOW,
                                           .causal = 1};
  check(flash_dmattn_select_workspace_bytes(&select, NULL, &bytes));
  memory = lend(bytes);
  check(flash_dmattn_select(&select, NULL, memory, bytes));
  free(memory);

  const flash_dmattn_forward_args forward = {
      .struct_size = sizeof(forward),
      .query = float_tensor(&query[0][0][0], 4, query_shape),
      .key = float_tensor(&key[0][0], 4, key_shape),
      .value = float_tensor(&value[0][0], 4, key_shape),
      .bias = select.score, /* in models of this family the score is also added to the logits */
      .expiry = select.expiry,
      .out = float_tensor(&out[0][0][0], 4, query_shape),
      .lse = float_tensor(&lse[0][0], 3, lse_shape),
      .scale = scale,
      .causal = 1};
  check(flash_dmattn_forward_workspace_bytes(&forward, NULL, &bytes));
  memory = lend(bytes);
  check(flash_dmattn_forward(&forward, NULL, memory, bytes));
  free(memory);

  const flash_dmattn_backward_args backward = {.struct_size = sizeof(backward),
                                               .query = forward.query,
                                               .key = forward.key,
                                               .value = forward.value,
                                               .bias = forward.bias,
                                               .expiry = forward.expiry,
                                               .out = forward.out,
                                               .lse = forward.lse,
                                               .dout = float_tensor(&dout[0][0][0], 4, query_shape),
                                               .dq = float_tensor(&dq[0][0][0], 4, query_shape),
                                               .dk = float_tensor(&dk[0][0], 4, key_shape),
                                               .dv = float_tensor(&dv[0][0], 4, key_shape),
                                               .dbias = float_tensor(dscore, 3, score_shape),
                                               .scale = scale,
                                               .causal = 1};
  check(flash_dmattn_backward_workspace_bytes(&backward, NULL, &bytes));
  memory = lend(bytes);
  check(flash_dmattn_backward(&backward, NULL, memory, bytes));
  free(memory);
}

static double largest_error = 0;

static void compare(double got, double want) {
  const double error = fabs(got - want) / (1 + fabs(want));
  if (!(error <= largest_error)) largest_error = error; /* NaN stays */
}

/* Whether fewer than WINDOW keys up to the position rank above the key; of equal scores the later one does.
 */
static int sees(int position, int j) {
  int better = 0;
  for (int other = 0; other <= position; ++other) {
    better += score[other] > score[j] || (score[other] == score[j] && other > j);
  }
  return j <= position && better < WINDOW;
}

static double dot(const float* a, const float* b) {
  double sum = 0;
  for (int c = 0; c < HEAD_DIM; ++c) sum += (double)a[c] * b[c];
  return sum;
}

static double want_dk[TOKENS][HEAD_DIM], want_dv[TOKENS][HEAD_DIM], want_dscore[TOKENS];

static void check_row(int i, int head) {
  double weight[TOKENS] = {0}, want_dq[HEAD_DIM] = {0}, sum = 0, delta = 0;
  for (int j = 0; j < TOKENS; ++j) {
    if (sees(i, j)) weight[j] = exp(scale * dot(query[i][head], key[j]) + score[j]);
    sum += weight[j];
  }
  compare(lse[head][i], log(sum));
  for (int c = 0; c < HEAD_DIM; ++c) {
    double want = 0;
    for (int j = 0; j < TOKENS; ++j) want += weight[j] / sum * value[j][c];
    compare(out[i][head][c], want);
    delta += want * dout[i][head][c];
  }
  for (int j = 0; j < TOKENS; ++j) {
    const double share = weight[j] / sum, dlogit = share * (dot(dout[i][head], value[j]) - delta);
    want_dscore[j] += dlogit;
    for (int c = 0; c < HEAD_DIM; ++c) {
      want_dq[c] += scale * dlogit * key[j][c];
      want_dk[j][c] += scale * dlogit * query[i][head][c];
      want_dv[j][c] += share * dout[i][head][c];
    }
  }
  for (int c = 0; c < HEAD_DIM; ++c) compare(dq[i][head][c], want_dq[c]);
}

int main(void) {
  float* const inputs[] = {&query[0][0][0], &key[0][0], &value[0][0], &dout[0][0][0], score};
  const int sizes[] = {TOKENS * HEADS * HEAD_DIM, TOKENS * HEAD_DIM, TOKENS * HEAD_DIM,
                       TOKENS * HEADS * HEAD_DIM, TOKENS};
  char build[128];
  uint32_t state = 1;
  for (int n = 0; n < 5; ++n) {
    for (int i = 0; i < sizes[n]; ++i) {
      state = state * 1664525u + 1013904223u;
      inputs[n][i] = (float)(state >> 8) / (1 << 23) - 1; /* in [-1, 1) */
    }
  }
  run_library();

  int wrong = 0;
  for (int j = 0; j < TOKENS; ++j) {
    int expires = j;
    while (expires < TOKENS && sees(expires, j)) ++expires;
    wrong += expiry[j] != expires;
  }
  for (int i = 0; i < TOKENS; ++i) {
    for (int head = 0; head < HEADS; ++head) check_row(i, head);
  }
  for (int j = 0; j < TOKENS; ++j) {
    compare(dscore[j], want_dscore[j]);
    for (int c = 0; c < HEAD_DIM; ++c) compare(dk[j][c], want_dk[j][c]);
    for (int c = 0; c < HEAD_DIM; ++c) compare(dv[j][c], want_dv[j][c]);
  }
  check(flash_dmattn_describe_build(build, sizeof(build), NULL));
  printf("flash_dmattn %s, %s\n", flash_dmattn_version(), build);
  printf("%d of %d lifetimes differ; largest error %.1e\n", wrong, TOKENS, largest_error);
  return wrong == 0 && largest_error < 1e-5 ? 0 : 1;
}
