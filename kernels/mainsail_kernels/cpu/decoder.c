// A Llama decoder on the CPU: all layers of one step in one call, for AVX-512, in float32 or (BF16=1) bfloat16.
//
// What lies in memory as T (weights, the KV cache, inputs of products) is read in words of 32 bits: one float, or two
// bfloat16 that the CPU multiplies and adds in one instruction. A matrix is packed in panels of 48 outputs, so that a
// tile of 8 rows x 48 outputs keeps its sums in 24 registers while the panel passes by once:
//
//     packed [ceil(outputs / 48)][words of an input row][48] words
//
// Sums are in float32, in the same order whatever else is in the batch: a row's result does not depend on its neighbours,
// nor on the number of threads. The residual stream stays in float32 through all layers. Threads live through the whole
// step. What a phase of it has to do is cut into pieces that whoever is free takes, and the next begins when all pieces
// are done, not when all threads are there: one that the system has put aside holds up nothing but the piece in its hand.
//
// Attention takes the rows of a prompt's chunk like decodes: each sees the positions of its sequence up to its own, as
// runs of 8 blocks whose softmax is corrected by the next (Milakov and Gimelshein, 2018). What a row does not see may hold
// anything, NaN included.

#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define VECTOR 16
#define WIDE 3
#define PANEL (WIDE * VECTOR)
#define TILE 8
#ifndef AHEAD
#define AHEAD 4096
#endif
#define BLOCK 16
#define RUN (8 * BLOCK)
#define TOGETHER 4
#define ROWS_OF_A_PIECE 64
#define SPINS 2000

typedef __m512 vec;

#if BF16
typedef uint16_t T;
#define PER_WORD 2
INLINE vec dot(vec sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
INLINE void store(T *to, vec x, __mmask16 some) { _mm256_mask_storeu_epi16(to, some, (__m256i)_mm512_cvtneps_pbh(x)); }
INLINE vec load(const T *from) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}
#else
typedef float T;
#define PER_WORD 1
INLINE vec dot(vec sum, __m512i a, __m512i b) { return _mm512_fmadd_ps((vec)a, (vec)b, sum); }
INLINE void store(T *to, vec x, __mmask16 some) { _mm512_mask_storeu_ps(to, some, x); }
INLINE vec load(const T *from) { return _mm512_loadu_ps(from); }
#endif

typedef struct {
    const float *input_norm, *post_norm, *qkv_bias, *q_norm, *k_norm, *cos_sin;
    const uint32_t *qkv, *output, *gate, *up, *down;
    T *kv;
    int64_t rotary_dim, window;
} Layer;

typedef struct {
    int64_t num_layers, hidden, intermediate, heads, kv_heads, head_dim;
    float eps, scale;
    const float *norm;  // NULL: a stage of several that is not the last
    const Layer *layers;
} Model;

typedef struct {
    int64_t rows, table_width;
    const int64_t *positions, *slots;
    const int32_t *sequences, *tables;
    float *residual, *qkv;
    T *normed, *query, *seen, *inner;
} Step;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE __mmask16 first_lanes(int64_t count) { return count >= VECTOR ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

// e^x within 2 ulp for x <= 0 or so; NaN stays NaN (the order of min and max keeps their second operand).
INLINE vec exponential(vec x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.3f), x);
    vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    vec r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    vec p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// -- pieces --------------------------------------------------------------------------------------------------------

typedef struct {
    int64_t next, done, apart[6];  // a cache line
} Phase;

// A piece that nobody has, from 0 on; -1 when the phase is over, which is waited for.
static int64_t take(Phase *phase, int64_t pieces) {
    int64_t piece = __atomic_fetch_add(&phase->next, 1, __ATOMIC_RELAXED);
    if (piece < pieces) return piece;
    for (int spins = 0; __atomic_load_n(&phase->done, __ATOMIC_ACQUIRE) < pieces; spins++) {
        if (spins < SPINS) _mm_pause();
        else sched_yield();
    }
    return -1;
}

static int64_t took(Phase *phase, int64_t pieces) {
    __atomic_fetch_add(&phase->done, 1, __ATOMIC_RELEASE);
    return take(phase, pieces);
}

#define PIECES(i, count, phase) for (int64_t i = take(phase, count); i >= 0; i = took(phase, count))

// -- products ------------------------------------------------------------------------------------------------------

// sums[row][part] of a tile: x is the first of its rows, `words` apart.
INLINE void tile(vec out[TILE][WIDE], const int rows, const uint32_t *x, int64_t words, const uint32_t *panel) {
    vec sums[TILE][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int part = 0; part < WIDE; part++) sums[r][part] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++, panel += PANEL) {
        __m512i b[WIDE];
#pragma GCC unroll 3
        for (int part = 0; part < WIDE; part++) {
            _mm_prefetch((const char *)(panel + part * VECTOR) + AHEAD, _MM_HINT_T0);
            b[part] = _mm512_loadu_si512(panel + part * VECTOR);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512i a = _mm512_set1_epi32((int)x[r * words + k]);
#pragma GCC unroll 3
            for (int part = 0; part < WIDE; part++) sums[r][part] = dot(sums[r][part], a, b[part]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int part = 0; part < WIDE; part++) out[r][part] = sums[r][part];
}

static void product(vec sums[TILE][WIDE], int rows, const uint32_t *x, int64_t words, const uint32_t *panel) {
    switch (rows) {
#define CASE(n) case n: tile(sums, n, x, words, panel); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
    }
}

enum { STORE, STORE_WIDE, ADD, GATED };

// One piece of a product: a panel of outputs of some rows.
typedef struct {
    const T *x;
    int64_t inputs, outputs;
    const uint32_t *weight, *up;
    const float *bias;
    void *out;
    int end;
} Product;

INLINE vec silu(vec x) {
    vec minus = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-88.0f), x)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(minus)));
}

INLINE void finish(const Product *p, int64_t row, int64_t column, vec x, vec up) {
    __mmask16 some = first_lanes(p->outputs - column);
    float *wide = (float *)p->out + row * p->outputs + column;
    T *narrow = (T *)p->out + row * p->outputs + column;
    if (p->bias) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(some, p->bias + column));
    if (p->end == ADD) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(some, wide));
    if (p->end == GATED) x = _mm512_mul_ps(silu(x), up);
    if (p->end == ADD || p->end == STORE_WIDE) _mm512_mask_storeu_ps(wide, some, x);
    else store(narrow, x, some);
}

static void piece(const Product *p, int64_t panel, int64_t first, int64_t last) {
    vec sums[TILE][WIDE], ups[TILE][WIDE];
    int64_t words = p->inputs / PER_WORD, start = panel * words * PANEL;
    int64_t tiles = (last - first + TILE - 1) / TILE;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t from = first + (last - first) * t / tiles, rows = first + (last - first) * (t + 1) / tiles - from;
        const uint32_t *x = (const uint32_t *)p->x + from * words;
        product(sums, (int)rows, x, words, p->weight + start);
        if (p->up) product(ups, (int)rows, x, words, p->up + start);
        for (int64_t r = 0; r < rows; r++)
            for (int part = 0; part < WIDE; part++)
                finish(p, from + r, panel * PANEL + part * VECTOR, sums[r][part], ups[r][part]);
    }
}

static void multiply(const Product p, int64_t rows, Phase *phase) {
    int64_t parts = (rows + ROWS_OF_A_PIECE - 1) / ROWS_OF_A_PIECE, panels = (p.outputs + PANEL - 1) / PANEL;
    PIECES(i, panels * parts, phase)
        piece(&p, i / parts, rows * (i % parts) / parts, rows * (i % parts + 1) / parts);
}

// -- rows ----------------------------------------------------------------------------------------------------------

INLINE float rms(const float *x, int64_t size, float eps) {
    vec sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += VECTOR) {
        vec v = _mm512_maskz_loadu_ps(first_lanes(size - i), x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)size + eps);
}

INLINE void normalize_row(const float *x, const float *weight, T *out, int64_t size, float eps) {
    vec factor = _mm512_set1_ps(rms(x, size, eps));
    for (int64_t i = 0; i < size; i += VECTOR) {
        __mmask16 some = first_lanes(size - i);
        vec v = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, x + i), factor);
        store(out + i, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(some, weight + i)), some);
    }
}

static void normalize(const float *x, const float *weight, T *out, int64_t rows, int64_t size, float eps, Phase *phase) {
    PIECES(i, (rows + TILE - 1) / TILE, phase)
        for (int64_t row = i * TILE; row < least(rows, (i + 1) * TILE); row++)
            normalize_row(x + row * size, weight, out + row * size, size, eps);
}

INLINE void rotate(float *x, const float *cos_sin, int64_t half) {
    for (int64_t i = 0; i < half; i += VECTOR) {
        __mmask16 some = first_lanes(half - i);
        vec a = _mm512_maskz_loadu_ps(some, x + i), b = _mm512_maskz_loadu_ps(some, x + half + i);
        vec cos = _mm512_maskz_loadu_ps(some, cos_sin + i), sin = _mm512_maskz_loadu_ps(some, cos_sin + half + i);
        _mm512_mask_storeu_ps(x + i, some, _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin)));
        _mm512_mask_storeu_ps(x + half + i, some, _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin)));
    }
}

INLINE void narrow(T *to, const float *from, int64_t size) {
    for (int64_t i = 0; i < size; i += VECTOR) store(to + i, _mm512_loadu_ps(from + i), 0xffff);
}

INLINE void norm_head(float *x, const float *weight, int64_t size, float eps) {
    float factor = rms(x, size, eps);
    for (int64_t i = 0; i < size; i++) x[i] *= factor * weight[i];
}

// Norms and rotates the heads of a row; keys and values go to the cache, queries to step->query.
static void place_row(const Model *m, const Layer *layer, const Step *step, int64_t row) {
    int64_t dim = m->head_dim, heads = m->heads, kv_heads = m->kv_heads, slot = step->slots[row];
    float *x = step->qkv + row * (heads + 2 * kv_heads) * dim;
    const float *cos_sin = layer->cos_sin + step->positions[row] * layer->rotary_dim;
    for (int64_t h = 0; h < heads + kv_heads; h++) {
        const float *weight = h < heads ? layer->q_norm : layer->k_norm;
        if (weight) norm_head(x + h * dim, weight, dim, m->eps);
        rotate(x + h * dim, cos_sin, layer->rotary_dim / 2);
    }
    narrow(step->query + row * heads * dim, x, heads * dim);
    for (int64_t h = 0; h < 2 * kv_heads && slot >= 0; h++)
        narrow(layer->kv + ((slot / BLOCK * 2 * kv_heads + h) * BLOCK + slot % BLOCK) * dim, x + (heads + h) * dim, dim);
}

static void place(const Model *m, const Layer *layer, const Step *step, Phase *phase) {
    PIECES(i, (step->rows + TILE - 1) / TILE, phase)
        for (int64_t row = i * TILE; row < least(step->rows, (i + 1) * TILE); row++) place_row(m, layer, step, row);
}

// -- attention -----------------------------------------------------------------------------------------------------

// The sum of each of 16 vectors.
INLINE vec sums_of(vec a[VECTOR]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d low = (__m512d)a[2 * i], high = (__m512d)a[2 * i + 1];
        a[i] = _mm512_add_ps((vec)_mm512_unpacklo_pd(low, high), (vec)_mm512_unpackhi_pd(low, high));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88), _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
}

// Products of a query with the 16 keys of a block.
INLINE vec scores_of(const T *query, const T *keys, const int dim) {
    const int parts = dim / (VECTOR * PER_WORD);
    vec sums[VECTOR];
#pragma GCC unroll 16
    for (int i = 0; i < VECTOR; i++) {
        sums[i] = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int part = 0; part < parts; part++)
            sums[i] = dot(sums[i], _mm512_loadu_si512(query + part * VECTOR * PER_WORD), _mm512_loadu_si512(keys + i * dim + part * VECTOR * PER_WORD));
    }
    return sums_of(sums);
}

typedef struct {
    const T *query;
    T *out;
    const T *kv;
    const int32_t *table;
    int64_t kv_heads, head;
    int64_t from, to;
    float scale;
} Context;

// What is scattered over the pool comes from memory while something else is computed.
INLINE void fetch(const T *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof(T)) _mm_prefetch((const char *)(from + i), _MM_HINT_T0);
}

// Some heads (of the same keys) of one row: positions from..to of its sequence.
INLINE void attend(const Context *c, const int heads, const int dim) {
    const int parts = dim / VECTOR;
    float scores[TOGETHER][RUN], most[TOGETHER], total[TOGETHER];
    vec mixed[TOGETHER][128 / VECTOR];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++) {
        most[h] = -INFINITY;
        total[h] = 0.0f;
#pragma GCC unroll 8
        for (int part = 0; part < parts; part++) mixed[h][part] = _mm512_setzero_ps();
    }
    int64_t side = BLOCK * dim * c->kv_heads;
    for (int64_t run = c->from / BLOCK * BLOCK; run < c->to; run += RUN) {
        int64_t stop = least(run + RUN, c->to), first = c->from > run ? c->from : run;
        vec best[TOGETHER];
        for (int h = 0; h < heads; h++) best[h] = _mm512_set1_ps(-INFINITY);
        for (int64_t at = run; at < stop; at += BLOCK) {
            const T *keys = c->kv + c->table[at / BLOCK] * 2 * side + c->head * BLOCK * dim;
            fetch(keys + side, BLOCK * dim);
            if (at + BLOCK < c->to) fetch(c->kv + c->table[at / BLOCK + 1] * 2 * side + c->head * BLOCK * dim, BLOCK * dim);
            __mmask16 visible = first_lanes(stop - at) & (__mmask16)~first_lanes(first - at);
            for (int h = 0; h < heads; h++) {
                vec s = _mm512_mul_ps(scores_of(c->query + h * dim, keys, dim), _mm512_set1_ps(c->scale));
                s = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), visible, s);
                best[h] = _mm512_max_ps(best[h], s);
                _mm512_storeu_ps(scores[h] + (at - run), s);
            }
        }
        for (int h = 0; h < heads; h++) {
            float now = fmaxf(most[h], _mm512_reduce_max_ps(best[h])), kept = expf(most[h] - now);
            vec sum = _mm512_setzero_ps();
            for (int64_t at = run; at < stop; at += BLOCK) {
                vec s = _mm512_loadu_ps(scores[h] + (at - run));
                __mmask16 hidden = _mm512_cmp_ps_mask(s, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
                s = _mm512_mask_mov_ps(exponential(_mm512_sub_ps(s, _mm512_set1_ps(now))), hidden, _mm512_setzero_ps());
                _mm512_storeu_ps(scores[h] + (at - run), s);
                sum = _mm512_add_ps(sum, s);
            }
            total[h] = total[h] * kept + _mm512_reduce_add_ps(sum);
            most[h] = now;
            for (int part = 0; part < parts; part++) mixed[h][part] = _mm512_mul_ps(mixed[h][part], _mm512_set1_ps(kept));
        }
        for (int64_t at = run; at < stop; at += BLOCK) {
            const T *values = c->kv + (c->table[at / BLOCK] * 2 + 1) * side + c->head * BLOCK * dim;
            for (int64_t i = at < first ? first - at : 0; i < least(BLOCK, stop - at); i++)
#pragma GCC unroll 8
                for (int part = 0; part < parts; part++) {
                    vec v = load(values + i * dim + part * VECTOR);
#pragma GCC unroll 4
                    for (int h = 0; h < heads; h++)
                        mixed[h][part] = _mm512_fmadd_ps(v, _mm512_set1_ps(scores[h][at - run + i]), mixed[h][part]);
                }
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 8
        for (int part = 0; part < parts; part++)
            store(c->out + h * dim + part * VECTOR, _mm512_div_ps(mixed[h][part], _mm512_set1_ps(total[h])), 0xffff);
}

static void attend_some(const Context *c, int64_t heads, int64_t dim) {
    switch (heads * 1000 + dim) {
#define HEADS(n, d) case n * 1000 + d: attend(c, n, d); break;
#define ALL(d) HEADS(1, d) HEADS(2, d) HEADS(3, d) HEADS(4, d)
#if !BF16
        ALL(16)
#endif
        ALL(32) ALL(64) HEADS(1, 128) HEADS(2, 128) HEADS(3, 128)
    }
}

static void look_from(const Model *m, const Layer *layer, const Step *step, int64_t row, int64_t head) {
    int64_t dim = m->head_dim, group = m->heads / m->kv_heads, together = dim > 64 ? 3 : 4;
    int64_t parts = (group + together - 1) / together, to = step->positions[row] + 1;
    int64_t from = layer->window && to > layer->window ? to - layer->window : 0;
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = group * part / parts, last = group * (part + 1) / parts;
        int64_t at = (row * m->heads + head * group + first) * dim;
        Context c = {step->query + at, step->seen + at, layer->kv, step->tables + step->sequences[row] * step->table_width,
                     m->kv_heads, head, from, to, m->scale};
        attend_some(&c, last - first, dim);
    }
}

static void look(const Model *m, const Layer *layer, const Step *step, Phase *phase) {
    PIECES(i, step->rows * m->kv_heads, phase) look_from(m, layer, step, i / m->kv_heads, i % m->kv_heads);
}

// -- what is called ------------------------------------------------------------------------------------------------

static void forward(const Model *m, const Step *step, Phase *phase) {
    int64_t rows = step->rows, attended = m->heads * m->head_dim, qkv = attended + 2 * m->kv_heads * m->head_dim;
    for (const Layer *layer = m->layers; layer < m->layers + m->num_layers; layer++) {
        normalize(step->residual, layer->input_norm, step->normed, rows, m->hidden, m->eps, phase++);
        multiply((Product){step->normed, m->hidden, qkv, layer->qkv, NULL, layer->qkv_bias, step->qkv, STORE_WIDE}, rows, phase++);
        place(m, layer, step, phase++);
        look(m, layer, step, phase++);
        multiply((Product){step->seen, attended, m->hidden, layer->output, NULL, NULL, step->residual, ADD}, rows, phase++);
        normalize(step->residual, layer->post_norm, step->normed, rows, m->hidden, m->eps, phase++);
        multiply((Product){step->normed, m->hidden, m->intermediate, layer->gate, layer->up, NULL, step->inner, GATED}, rows, phase++);
        multiply((Product){step->inner, m->intermediate, m->hidden, layer->down, NULL, NULL, step->residual, ADD}, rows, phase++);
    }
    if (m->norm) normalize(step->residual, m->norm, step->normed, rows, m->hidden, m->eps, phase);
}

#define PHASES_OF_A_LAYER 8

// All layers: step->residual in and out, and with a last norm the normed hidden states in step->normed out. Not 0: there
// is no memory.
int decoder_forward(const Model *m, const Step *step, int64_t threads) {
    Phase *phases = calloc(m->num_layers * PHASES_OF_A_LAYER + 1, sizeof(Phase));
    if (!phases) return 1;
#pragma omp parallel num_threads(threads)
    forward(m, step, phases);
    free(phases);
    return 0;
}

// out [rows, outputs] = x [rows, inputs] times the packed weight, plus the bias (may be NULL); with `up` silu of it, times
// x times up.
void decoder_linear(const T *x, const uint32_t *weight, const uint32_t *up, const float *bias, T *out,
                    int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
    Phase phase = {0};
#pragma omp parallel num_threads(threads)
    multiply((Product){x, inputs, outputs, weight, up, bias, out, up ? GATED : STORE}, rows, &phase);
}

// weight [outputs, inputs] into panels, what is over filled with zeros.
void decoder_pack(const T *weight, uint32_t *packed, int64_t outputs, int64_t inputs, int64_t threads) {
    int64_t words = inputs / PER_WORD, panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        const uint32_t *from = (const uint32_t *)(weight + panel * PANEL * inputs);
        uint32_t *to = packed + panel * words * PANEL;
        int64_t rows = least(PANEL, outputs - panel * PANEL);
        for (int64_t k = 0; k < words; k++)
            for (int64_t row = 0; row < PANEL; row++) to[k * PANEL + row] = row < rows ? from[row * words + k] : 0;
    }
}
