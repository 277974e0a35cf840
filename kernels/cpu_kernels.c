/* What a decode step on a CPU does besides its matrix products, for bfloat16.
 *
 * Each function is the twin of an operation in a Python file of this folder, where its definition
 * and its tests are; see cpu_library.py for how this is compiled and called. A step of a small model
 * is hundreds of calls of a few microseconds, so here one call does what took ten. Arithmetic is
 * float32. No function splits the keys or the values of a row among threads: a row's result does not
 * depend on how many rows or threads there are. NaN is for integers to find: the compiler may assume
 * that no float is one, so a clamp can swallow it; where it stands in a hidden state or a value it
 * passes through sums and products as it should.
 *
 * Shapes: T tokens, B requests, H hidden size, N query heads, K key/value heads, D head size, I
 * intermediate size, R rotated values of a head, M blocks of a request.
 */
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

enum { KEYS_AT_A_TIME = 64, MAX_GROUP = 16, MAX_HEAD_DIM = 256 };

/* A call to another thread costs as much as some 20 thousand values. */
static const long VALUES_PER_THREAD = 1L << 15;

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* To the nearest, ties to even; NaN stays NaN. */
static inline bf16 narrow(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    uint32_t is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return (bf16)((bits + (is_nan ? 0u : 0x7fffu + ((bits >> 16) & 1u))) >> 16 | is_nan << 6);
}

/* exp(x), within 2 units of the last place; 0 below -87, and infinity above 88 stays finite. */
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = __builtin_floorf(x * 1.44269504088896341f + 0.5f);
    float r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

static inline int threads_for(long values, long rows, int max_threads) {
    long wanted = values / VALUES_PER_THREAD;
    wanted = wanted > rows ? rows : wanted;
    wanted = wanted > max_threads ? max_threads : wanted;
    return wanted < 1 ? 1 : (int)wanted;
}

/* kernels.rms_norm: h = x + residual; y = h / rms(h) * weight.
 *
 * residual: float32 [T, H], or bfloat16, or neither is there: then h is x, and not written. */
void add_rms_norm(const bf16 *x, const float *residual, const bf16 *narrow_residual,
                  const float *weight, bf16 *y, float *h, long T, long H, float eps,
                  int max_threads) {
#pragma omp parallel for num_threads(threads_for(T *H, T, max_threads))
    for (long t = 0; t < T; t++) {
        const bf16 *x_row = x + t * H;
        float sum = 0.0f;
        if (residual || narrow_residual) {
            float *h_row = h + t * H;
            if (residual) {
                const float *from = residual + t * H;
#pragma omp simd
                for (long i = 0; i < H; i++) h_row[i] = widen(x_row[i]) + from[i];
            } else {
                const bf16 *from = narrow_residual + t * H;
#pragma omp simd
                for (long i = 0; i < H; i++) h_row[i] = widen(x_row[i]) + widen(from[i]);
            }
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < H; i++) sum += h_row[i] * h_row[i];
            float scale = 1.0f / __builtin_sqrtf(sum / (float)H + eps);
#pragma omp simd
            for (long i = 0; i < H; i++) y[t * H + i] = narrow(h_row[i] * scale * weight[i]);
        } else {
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < H; i++) sum += widen(x_row[i]) * widen(x_row[i]);
            float scale = 1.0f / __builtin_sqrtf(sum / (float)H + eps);
#pragma omp simd
            for (long i = 0; i < H; i++) y[t * H + i] = narrow(widen(x_row[i]) * scale * weight[i]);
        }
    }
}

/* One head: norm where there is a weight, then rotation of the first R values. */
static inline void finish_head(const bf16 *from, bf16 *to, const float *weight, float eps,
                               const float *cos, const float *sin, long R, long D) {
    float x[MAX_HEAD_DIM];
#pragma omp simd
    for (long i = 0; i < D; i++) x[i] = widen(from[i]);
    if (weight) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < D; i++) sum += x[i] * x[i];
        float scale = 1.0f / __builtin_sqrtf(sum / (float)D + eps);
#pragma omp simd
        for (long i = 0; i < D; i++) x[i] *= scale * weight[i];
    }
    long half = R / 2;
#pragma omp simd
    for (long i = 0; i < half; i++) {
        to[i] = narrow(x[i] * cos[i] + x[i + half] * sin[i]);
        to[i + half] = narrow(x[i + half] * cos[i + half] + x[i] * sin[i + half]);
    }
#pragma omp simd
    for (long i = R; i < D; i++) to[i] = narrow(x[i]);
}

/* kernels.qkv_rope_store: queries out, keys and values into the cache at their slots.
 *
 * cos, sin: [T, R] float32, each half there and the sign of the first included; R = 0: no rotation.
 * q_weight, k_weight: [D] float32, or neither. Returns 0, or 1 where a slot is not one of num_slots:
 * then nothing is written. */
int qkv_rope_store(const bf16 *qkv, long row_stride, bf16 *q, bf16 *key_cache, bf16 *value_cache,
                    const int64_t *slots, const float *cos, const float *sin, long R,
                    const float *q_weight, const float *k_weight, float eps, long T, long N, long K,
                    long D, long num_slots, int max_threads) {
    for (long t = 0; t < T; t++)
        if (slots[t] < 0 || slots[t] >= num_slots) return 1;
#pragma omp parallel for num_threads(threads_for(T *(N + 2 * K) * D, T, max_threads))
    for (long t = 0; t < T; t++) {
        const bf16 *row = qkv + t * row_stride;
        const float *c = cos + t * R, *s = sin + t * R;
        bf16 *key = key_cache + slots[t] * K * D, *value = value_cache + slots[t] * K * D;
        for (long n = 0; n < N; n++)
            finish_head(row + n * D, q + (t * N + n) * D, q_weight, eps, c, s, R, D);
        for (long k = 0; k < K; k++)
            finish_head(row + (N + k) * D, key + k * D, k_weight, eps, c, s, R, D);
        memcpy(value, row + (N + K) * D, (size_t)(K * D) * sizeof(bf16));
    }
    return 0;
}

/* kernels.activation: y = silu(gate) * up, x = [gate | up]. */
void silu_and_mul(const bf16 *x, bf16 *y, long T, long I, int max_threads) {
#pragma omp parallel for num_threads(threads_for(2 * T * I, T, max_threads))
    for (long t = 0; t < T; t++) {
        const bf16 *gate = x + 2 * t * I, *up = gate + I;
#pragma omp simd
        for (long i = 0; i < I; i++) {
            float g = widen(gate[i]);
            y[t * I + i] = narrow(g / (1.0f + fast_exp(-g)) * widen(up[i]));
        }
    }
}

/* The keys of one request and one key head, for the G query heads that share it. Inlined, so that
 * the usual head sizes are constants. */
static inline __attribute__((always_inline)) void attend_head(const bf16 *q, const bf16 *keys, const bf16 *values, const int32_t *blocks,
                        long first, long seq_len, long block_size, long token_stride, long G,
                        long D, float scale, float soft_cap, bf16 *out) {
    float queries[MAX_GROUP * MAX_HEAD_DIM], sums[MAX_GROUP * MAX_HEAD_DIM];
    float weights[MAX_GROUP][KEYS_AT_A_TIME], highest[MAX_GROUP], total[MAX_GROUP];
    for (long i = 0; i < G * D; i++) queries[i] = widen(q[i]) * scale, sums[i] = 0.0f;
    for (long g = 0; g < G; g++) highest[g] = -3.0e38f, total[g] = 0.0f;
    for (long start = first; start < seq_len; start += KEYS_AT_A_TIME) {
        long count = seq_len - start < KEYS_AT_A_TIME ? seq_len - start : KEYS_AT_A_TIME;
        for (long j = 0; j < count; j++) {
            long at = start + j;
            const bf16 *key = keys + (blocks[at / block_size] * block_size + at % block_size) * token_stride;
            float wide[MAX_HEAD_DIM];
#pragma omp simd
            for (long d = 0; d < D; d++) wide[d] = widen(key[d]);
            for (long g = 0; g < G; g++) {
                float score = 0.0f;
#pragma omp simd reduction(+ : score)
                for (long d = 0; d < D; d++) score += queries[g * D + d] * wide[d];
                weights[g][j] = score;
            }
        }
        for (long g = 0; g < G; g++) {
            float *w = weights[g], top = highest[g], sum = 0.0f;
            if (soft_cap > 0.0f) { /* tanh(z) = 1 - 2 / (exp(2z) + 1) */
#pragma omp simd
                for (long j = 0; j < count; j++)
                    w[j] = soft_cap - 2.0f * soft_cap / (fast_exp(2.0f * w[j] / soft_cap) + 1.0f);
            }
            for (long j = 0; j < count; j++) top = w[j] > top ? w[j] : top;
            float shrink = fast_exp(highest[g] - top);
#pragma omp simd reduction(+ : sum)
            for (long j = 0; j < count; j++) {
                w[j] = fast_exp(w[j] - top);
                sum += w[j];
            }
            total[g] = total[g] * shrink + sum;
            highest[g] = top;
#pragma omp simd
            for (long d = 0; d < D; d++) sums[g * D + d] *= shrink;
        }
        for (long j = 0; j < count; j++) {
            long at = start + j;
            const bf16 *value = values + (blocks[at / block_size] * block_size + at % block_size) * token_stride;
            float wide[MAX_HEAD_DIM];
#pragma omp simd
            for (long d = 0; d < D; d++) wide[d] = widen(value[d]);
            for (long g = 0; g < G; g++) {
                float w = weights[g][j];
#pragma omp simd
                for (long d = 0; d < D; d++) sums[g * D + d] += w * wide[d];
            }
        }
    }
    for (long g = 0; g < G; g++) {
        float inverse = 1.0f / total[g];
#pragma omp simd
        for (long d = 0; d < D; d++) out[g * D + d] = narrow(sums[g * D + d] * inverse);
    }
}

/* kernels.paged_attention for requests with one query each; the others' rows are left alone.
 *
 * window: keys that a query sees, itself included; 0: all. soft_cap: 0: none. */
void decode_attention(const bf16 *q, long q_stride, const bf16 *key_cache, const bf16 *value_cache,
                      const int32_t *block_table, long table_stride, const int32_t *query_start_loc,
                      const int32_t *seq_lens, bf16 *out, long B, long N, long K, long D,
                      long block_size, long window, float scale, float soft_cap, int max_threads) {
    long G = N / K, work = 0;
    for (long b = 0; b < B; b++) work += 2 * seq_lens[b] * N * D;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(work, B * K, max_threads))
    for (long item = 0; item < B * K; item++) {
        long b = item / K, k = item % K, row = query_start_loc[b];
        if (query_start_loc[b + 1] - row != 1 || seq_lens[b] < 1) continue;
        long first = window > 0 && seq_lens[b] > window ? seq_lens[b] - window : 0;
        const bf16 *queries = q + row * q_stride + k * G * D;
        const bf16 *keys = key_cache + k * D, *values = value_cache + k * D;
        const int32_t *blocks = block_table + b * table_stride;
        bf16 *to = out + (row * N + k * G) * D;
#define ATTEND(HEAD_DIM) \
    attend_head(queries, keys, values, blocks, first, seq_lens[b], block_size, K * D, G, HEAD_DIM, \
                scale, soft_cap, to)
        if (D == 64) ATTEND(64);
        else if (D == 128) ATTEND(128);
        else ATTEND(D);
#undef ATTEND
    }
}
