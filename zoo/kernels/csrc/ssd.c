/* Mamba-2's state-space dual, forward and backward, as `reference.ssd` defines it; fp32.
 *
 * The recurrence itself, not its form in matrix products: a vector holds 16 of the N numbers that an inner channel of a
 * head keeps, TILE channels are in registers over a chunk of time, and B and C are read once for all of them. The backward
 * pass keeps one state every CHUNK steps and computes the others again. Work is split by (sequence, heads), whatever the
 * number of threads, so that sums have one order.
 *
 * -DSTATE=N is the number of states of a channel.
 */
#include "vector.h"

#define CHUNK 32
#define SPAN (CHUNK / LANES)
#define HEADS 4 /* heads of one backward task, fewer where a set of B and C has fewer */
#define VECTORS ((STATE + LANES - 1) / LANES)
#define TILE (VECTORS >= 8 ? 1 : VECTORS >= 4 ? 2 : 4)

typedef struct {
    int64_t threads, batch, steps, heads, width, sets, rows, groups; /* width: K; sets of B and C; groups of biases */
    const int64_t *row;   /* (batch, steps) */
    const uint8_t *first; /* (batch, steps) */
    const int64_t *count; /* (batch) */
    const int32_t *group; /* (rows) */
    const float *x;       /* (rows, heads * width), x_stride apart */
    const float *dt;      /* (rows, heads) */
    const float *B, *C;   /* (rows, sets * STATE) */
    int64_t x_stride, dt_stride, B_stride, C_stride;
    const float *bias;    /* (groups, heads) */
    const float *A, *D;   /* (heads) */
    const float *initial; /* (batch, heads, width, STATE) or null */
    float *y;             /* (rows, heads * width) */
    float *final;         /* (batch, heads, width, STATE) */
    float *saved;         /* (batch, chunks, heads, width, VECTORS, LANES) or null */
    /* backward alone */
    const float *dy, *dfinal;   /* dfinal or null */
    float *dx, *ddt;            /* (rows, heads * width), (rows, heads) */
    float *dB, *dC;             /* (tasks of a sequence, rows, STATE) */
    float *dA, *dD, *dbias;     /* (batch, heads), (batch, heads), (batch, groups, heads) */
    float *dinitial;            /* (batch, heads, width, STATE) */
} Dual;

/* One chunk of one head's time, brought together. */
typedef struct {
    int64_t start, length;
    int64_t row[CHUNK];
    vec B[CHUNK][VECTORS], C[CHUNK][VECTORS];
    union { vec v[SPAN]; float f[CHUNK]; } delta, slope, decay; /* decay 0 where a document begins */
} Chunk;

INLINE int64_t ceiling(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

INLINE void load_wide(vec *v, const float *p) {
    for (int i = 0; i < VECTORS; i++)
        v[i] = load(p + i * LANES, STATE - i * LANES < LANES ? STATE - i * LANES : LANES);
}

INLINE void store_wide(float *p, const vec *v) {
    for (int i = 0; i < VECTORS; i++)
        store(p + i * LANES, v[i], STATE - i * LANES < LANES ? STATE - i * LANES : LANES);
}

static void load_tokens(const Dual *s, Chunk *k, int64_t b, int64_t start, int64_t set) {
    k->start = start;
    k->length = s->count[b] - start < CHUNK ? s->count[b] - start : CHUNK;
    for (int64_t j = 0; j < k->length; j++) {
        k->row[j] = s->row[b * s->steps + start + j];
        load_wide(k->B[j], s->B + k->row[j] * s->B_stride + set * STATE);
        load_wide(k->C[j], s->C + k->row[j] * s->C_stride + set * STATE);
    }
}

static void load_steps(const Dual *s, Chunk *k, int64_t b, int64_t head) {
    for (int64_t j = 0; j < CHUNK; j++) {
        int64_t r = k->row[j < k->length ? j : 0];
        const float *bias = s->bias + (s->groups > 1 ? s->group[r] * s->heads : 0);
        k->delta.f[j] = s->dt[r * s->dt_stride + head] + bias[head];
    }
    for (int i = 0; i < SPAN; i++) {
        k->delta.v[i] = softplus(k->delta.v[i], &k->slope.v[i]);
        k->decay.v[i] = exponential(k->delta.v[i] * s->A[head]);
    }
    for (int64_t j = 0; j < k->length; j++)
        if (s->first[b * s->steps + k->start + j])
            k->decay.f[j] = 0.0f;
}

static void forward_task(const Dual *s, Chunk *k, vec *h, float *x, float *y, int64_t b, int64_t head) {
    int64_t width = s->width, padded = ceiling(width, TILE) * TILE, chunks = ceiling(s->steps, CHUNK);
    int64_t all = (b * s->heads + head) * width, at = head * width, set = head / (s->heads / s->sets);
    vec sums[TILE][CHUNK];
    memset(h, 0, padded * VECTORS * sizeof *h);
    memset(x, 0, padded * CHUNK * sizeof *x);
    for (int64_t p = 0; s->initial && p < width; p++)
        load_wide(h + p * VECTORS, s->initial + (all + p) * STATE);
    for (int64_t start = 0; start < s->count[b]; start += CHUNK) {
        load_tokens(s, k, b, start, set);
        load_steps(s, k, b, head);
        if (s->saved)
            memcpy(s->saved + ((b * chunks + start / CHUNK) * s->heads + head) * width * VECTORS * LANES, h,
                   width * VECTORS * sizeof *h);
        for (int64_t j = 0; j < k->length; j++)
            for (int64_t p = 0; p < width; p++)
                x[p * CHUNK + j] = s->x[k->row[j] * s->x_stride + at + p];
        for (int64_t p = 0; p < padded; p += TILE) {
            vec state[TILE][VECTORS];
            memcpy(state, h + p * VECTORS, sizeof state);
            for (int64_t j = 0; j < k->length; j++) {
#pragma GCC unroll 4
                for (int q = 0; q < TILE; q++) {
                    vec sum = splat(0.0f);
                    float input = k->delta.f[j] * x[(p + q) * CHUNK + j];
#pragma GCC unroll 8
                    for (int i = 0; i < VECTORS; i++) {
                        state[q][i] = state[q][i] * k->decay.f[j] + k->B[j][i] * input;
                        sum += state[q][i] * k->C[j][i];
                    }
                    sums[q][j] = sum;
                }
            }
            memcpy(h + p * VECTORS, state, sizeof state);
            for (int q = 0; q < TILE; q++)
                for (int i = 0; i < SPAN; i++)
                    store(y + (p + q) * CHUNK + i * LANES, sum_each(&sums[q][i * LANES]), LANES);
        }
        for (int64_t j = 0; j < k->length; j++)
            for (int64_t p = 0; p < width; p++)
                s->y[k->row[j] * s->heads * width + at + p] = y[p * CHUNK + j] + s->D[head] * x[p * CHUNK + j];
    }
    for (int64_t p = 0; p < width; p++)
        store_wide(s->final + (all + p) * STATE, h + p * VECTORS);
}

int ssd_forward(const Dual *s) {
    int64_t padded = ceiling(s->width, TILE) * TILE;
    int failed = 0;
#pragma omp parallel num_threads(s->threads) reduction(| : failed)
    {
        Chunk *k = aligned_alloc(sizeof(vec), ceiling(sizeof *k, sizeof(vec)) * sizeof(vec));
        vec *h = scratch(padded * VECTORS), *x = scratch(padded * SPAN), *y = scratch(padded * SPAN);
        failed |= !k || !h || !x || !y;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s->batch * s->heads; task++)
            if (!failed)
                forward_task(s, k, h, (float *)x, (float *)y, task / s->heads, task % s->heads);
        free(k);
        free(h);
        free(x);
        free(y);
    }
    return failed;
}

/* What the backward pass of one task needs at hand. */
typedef struct {
    Chunk chunk;
    vec state[CHUNK + 1][TILE][VECTORS]; /* state[j] stands before step j of the chunk, state[j + 1] after it */
    vec dB[CHUNK][VECTORS], dC[CHUNK][VECTORS]; /* summed over the task's heads */
    vec d_decay[CHUNK];                         /* lanes not yet summed */
    vec sums[TILE][CHUNK];
    vec *dh;          /* (heads of the task, padded, VECTORS) */
    float *x, *g, *d; /* (padded, CHUNK): x, dy, gradient of the input Δ x */
    float dD[HEADS], dA[HEADS];
} Work;

static void backward_tile(Work *w, vec *dh, int64_t p, const vec *start, int64_t channels) {
    const Chunk *k = &w->chunk;
    vec dstate[TILE][VECTORS];
    memset(w->state[0], 0, sizeof w->state[0]);
    memcpy(w->state[0], start, channels * VECTORS * sizeof *start);
    memcpy(dstate, dh, sizeof dstate);
    for (int64_t j = 0; j < k->length; j++)
        for (int q = 0; q < TILE; q++) {
            float input = k->delta.f[j] * w->x[(p + q) * CHUNK + j];
            for (int i = 0; i < VECTORS; i++)
                w->state[j + 1][q][i] = w->state[j][q][i] * k->decay.f[j] + k->B[j][i] * input;
        }
    for (int64_t j = k->length - 1; j >= 0; j--) {
        vec d_decay = w->d_decay[j], sum[TILE];
        float input[TILE], g[TILE];
        for (int q = 0; q < TILE; q++) {
            g[q] = w->g[(p + q) * CHUNK + j];
            input[q] = k->delta.f[j] * w->x[(p + q) * CHUNK + j];
            sum[q] = splat(0.0f);
        }
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) {
            vec dB = w->dB[j][i], dC = w->dC[j][i], B = k->B[j][i], C = k->C[j][i];
#pragma GCC unroll 4
            for (int q = 0; q < TILE; q++) {
                vec d = dstate[q][i] + C * g[q];
                dC += w->state[j + 1][q][i] * g[q];
                dB += d * input[q];
                sum[q] += d * B;
                d_decay += d * w->state[j][q][i];
                dstate[q][i] = d * k->decay.f[j];
            }
            w->dB[j][i] = dB;
            w->dC[j][i] = dC;
        }
        w->d_decay[j] = d_decay;
        for (int q = 0; q < TILE; q++)
            w->sums[q][j] = sum[q];
    }
    memcpy(dh, dstate, sizeof dstate);
    for (int q = 0; q < TILE; q++)
        for (int i = 0; i < SPAN; i++)
            store(w->d + (p + q) * CHUNK + i * LANES, sum_each(&w->sums[q][i * LANES]), LANES);
}

static void backward_head(const Dual *s, Work *w, int64_t b, int64_t head, int64_t which) {
    Chunk *k = &w->chunk;
    int64_t width = s->width, padded = ceiling(width, TILE) * TILE, chunks = ceiling(s->steps, CHUNK);
    int64_t at = head * width, inner = s->heads * width;
    const float *saved = s->saved + ((b * chunks + k->start / CHUNK) * s->heads + head) * width * VECTORS * LANES;
    union { vec v[SPAN]; float f[CHUNK]; } d_decay;
    load_steps(s, k, b, head);
    for (int64_t j = 0; j < k->length; j++)
        for (int64_t p = 0; p < width; p++) {
            w->x[p * CHUNK + j] = s->x[k->row[j] * s->x_stride + at + p];
            w->g[p * CHUNK + j] = s->dy[k->row[j] * inner + at + p];
        }
    memset(w->d_decay, 0, sizeof w->d_decay);
    for (int64_t p = 0; p < padded; p += TILE) {
        vec start[TILE][VECTORS];
        int64_t channels = width - p < TILE ? width - p : TILE;
        memcpy(start, saved + p * VECTORS * LANES, channels * sizeof start[0]);
        backward_tile(w, w->dh + (which * padded + p) * VECTORS, p, start[0], channels);
    }
    for (int i = 0; i < SPAN; i++)
        d_decay.v[i] = sum_each(&w->d_decay[i * LANES]) * k->decay.v[i];
    for (int64_t j = 0; j < k->length; j++) {
        float d_delta = d_decay.f[j] * s->A[head], skip = 0.0f, *dx = s->dx + k->row[j] * inner + at;
        for (int64_t p = 0; p < width; p++) {
            float x = w->x[p * CHUNK + j], g = w->g[p * CHUNK + j], d = w->d[p * CHUNK + j];
            dx[p] = d * k->delta.f[j] + g * s->D[head];
            d_delta += d * x;
            skip += g * x;
        }
        w->dA[which] += d_decay.f[j] * k->delta.f[j];
        w->dD[which] += skip;
        float ddt = d_delta * k->slope.f[j];
        s->ddt[k->row[j] * s->heads + head] = ddt;
        s->dbias[(b * s->groups + (s->groups > 1 ? s->group[k->row[j]] : 0)) * s->heads + head] += ddt;
    }
}

/* Heads [head, head + heads) of one set. */
static void backward_task(const Dual *s, Work *w, int64_t b, int64_t part, int64_t head, int64_t heads) {
    int64_t width = s->width, padded = ceiling(width, TILE) * TILE, set = head / (s->heads / s->sets);
    memset(w->dh, 0, heads * padded * VECTORS * sizeof *w->dh);
    memset(w->x, 0, padded * CHUNK * sizeof *w->x);
    memset(w->g, 0, padded * CHUNK * sizeof *w->g);
    memset(w->dA, 0, sizeof w->dA);
    memset(w->dD, 0, sizeof w->dD);
    for (int64_t i = 0; s->dfinal && i < heads; i++)
        for (int64_t p = 0; p < width; p++)
            load_wide(w->dh + (i * padded + p) * VECTORS, s->dfinal + ((b * s->heads + head + i) * width + p) * STATE);
    for (int64_t chunk = ceiling(s->count[b], CHUNK) - 1; chunk >= 0; chunk--) {
        load_tokens(s, &w->chunk, b, chunk * CHUNK, set);
        memset(w->dB, 0, sizeof w->dB);
        memset(w->dC, 0, sizeof w->dC);
        for (int64_t i = 0; i < heads; i++)
            backward_head(s, w, b, head + i, i);
        for (int64_t j = 0; j < w->chunk.length; j++) {
            store_wide(s->dB + (part * s->rows + w->chunk.row[j]) * STATE, w->dB[j]);
            store_wide(s->dC + (part * s->rows + w->chunk.row[j]) * STATE, w->dC[j]);
        }
    }
    for (int64_t i = 0; i < heads; i++) {
        for (int64_t p = 0; p < width; p++)
            store_wide(s->dinitial + ((b * s->heads + head + i) * width + p) * STATE, w->dh + (i * padded + p) * VECTORS);
        s->dA[b * s->heads + head + i] = w->dA[i];
        s->dD[b * s->heads + head + i] = w->dD[i];
    }
}

/* 0, or 1 where there is no memory. */
int ssd_backward(const Dual *s) {
    int64_t padded = ceiling(s->width, TILE) * TILE, shared = s->heads / s->sets, per_set = ceiling(shared, HEADS);
    int64_t parts = s->sets * per_set;
    int failed = 0;
#pragma omp parallel num_threads(s->threads) reduction(| : failed)
    {
        Work *w = aligned_alloc(sizeof(vec), ceiling(sizeof *w, sizeof(vec)) * sizeof(vec));
        vec *dh = scratch(HEADS * padded * VECTORS), *x = scratch(padded * SPAN), *g = scratch(padded * SPAN),
            *d = scratch(padded * SPAN);
        failed |= !w || !dh || !x || !g || !d;
        if (!failed) {
            w->dh = dh;
            w->x = (float *)x;
            w->g = (float *)g;
            w->d = (float *)d;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s->batch * parts; task++) {
            int64_t part = task % parts, set = part / per_set, begin = part % per_set * HEADS;
            int64_t heads = shared - begin < HEADS ? shared - begin : HEADS;
            if (!failed)
                backward_task(s, w, task / parts, part, set * shared + begin, heads);
        }
        free(w);
        free(dh);
        free(x);
        free(g);
        free(d);
    }
    return failed;
}
