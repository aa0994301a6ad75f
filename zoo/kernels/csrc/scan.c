/* Mamba-1's selective scan, forward and backward, as `reference.selective_scan` defines it; fp32.
 *
 * A vector holds 16 channels; the N states of each stay in registers over time. The backward pass keeps one state every
 * CHUNK steps and computes the others again. Work is split by (sequence, GROUP blocks of channels), whatever the number
 * of threads, so that sums have one order.
 *
 * -DSTATE=N is the number of states of a channel.
 */
#include "vector.h"

#define CHUNK 16
#define GROUP 8
#define SLOTS ((STATE + LANES - 1) / LANES * LANES) /* states, up to a whole vector */

typedef struct {
    int64_t threads, batch, steps, channels, rows, groups; /* groups: biases */
    const int64_t *row;     /* (batch, steps): row of each token; tokens first */
    const uint8_t *first;   /* (batch, steps): begins a document */
    const int64_t *count;   /* (batch): tokens */
    const int32_t *group;   /* (rows): bias of each row */
    const float *u, *dt, *z; /* (rows, channels), rows u_stride, ... apart */
    int64_t u_stride, dt_stride, z_stride;
    const float *B, *C;      /* (rows, STATE) */
    int64_t B_stride, C_stride;
    const float *bias;       /* (groups, channels) */
    const float *A, *D;      /* (channels, STATE), (channels) */
    const float *initial;    /* (batch, channels, STATE) or null */
    float *y;                /* (rows, channels) */
    float *final;            /* (batch, channels, STATE) */
    float *saved;            /* (batch, chunks, blocks, STATE, LANES) or null */
    /* backward alone */
    const float *dy, *dfinal; /* dfinal or null */
    float *du, *ddt, *dz;     /* (rows, channels) */
    float *dB, *dC;           /* (groups of blocks, rows, STATE) */
    float *dA, *dD, *dbias;   /* (batch, channels, STATE), (batch, channels), (batch, groups, channels) */
    float *dinitial;          /* (batch, channels, STATE) */
} Scan;

/* Channels [c, c + lanes) of a (channels, STATE) matrix, one vector a state. */
INLINE void load_states(vec *h, const float *p, int64_t c, int lanes) {
    for (int n = 0; n < STATE; n++) {
        h[n] = splat(0.0f);
        for (int i = 0; p && i < lanes; i++)
            h[n][i] = p[(c + i) * STATE + n];
    }
}

INLINE void store_states(float *p, const vec *h, int64_t c, int lanes) {
    for (int n = 0; n < STATE; n++)
        for (int i = 0; i < lanes; i++)
            p[(c + i) * STATE + n] = h[n][i];
}

INLINE int64_t ceiling(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

INLINE void forward_block(const Scan *s, int64_t b, int64_t block, int lanes) {
    int64_t c = block * LANES, chunks = ceiling(s->steps, CHUNK), blocks = ceiling(s->channels, LANES);
    vec h[STATE], a2[STATE];
    load_states(h, s->initial ? s->initial + b * s->channels * STATE : NULL, c, lanes);
    load_states(a2, s->A, c, lanes);
    for (int n = 0; n < STATE; n++)
        a2[n] *= 1.442695040888963f;
    vec d_skip = load(s->D + c, lanes), slope;
    for (int64_t t = 0; t < s->count[b]; t++) {
        if (s->saved && t % CHUNK == 0)
            memcpy(s->saved + ((b * chunks + t / CHUNK) * blocks + block) * STATE * LANES, h, sizeof h);
        int64_t r = s->row[b * s->steps + t];
        if (s->first[b * s->steps + t])
            for (int n = 0; n < STATE; n++)
                h[n] = splat(0.0f);
        const float *bias = s->bias + (s->groups > 1 ? s->group[r] * s->channels : 0) + c;
        const float *B = s->B + r * s->B_stride, *C = s->C + r * s->C_stride;
        vec u = load(s->u + r * s->u_stride + c, lanes), z = load(s->z + r * s->z_stride + c, lanes);
        vec delta = softplus(load(s->dt + r * s->dt_stride + c, lanes) + load(bias, lanes), &slope);
        vec input = delta * u, y = d_skip * u, y2 = splat(0.0f);
#pragma GCC unroll 16
        for (int n = 0; n < STATE; n++) {
            h[n] = power_of_two(delta * a2[n]) * h[n] + input * B[n];
            if (n & 1)
                y2 += h[n] * C[n];
            else
                y += h[n] * C[n];
        }
        store(s->y + r * s->channels + c, (y + y2) * z * sigmoid(z), lanes);
    }
    store_states(s->final + b * s->channels * STATE, h, c, lanes);
}

/* What the backward pass of one task needs at hand; everything but the sums is of one block and one chunk. */
typedef struct {
    vec state[CHUNK + 1][STATE]; /* state[j] stands before step j of the chunk, state[j + 1] after it */
    vec decay[CHUNK][STATE];     /* 0 where a document begins: nothing comes through from before, forward or back */
    vec delta[CHUNK], slope[CHUNK], y[CHUNK]; /* y before the gate */
    vec dB[CHUNK][SLOTS], dC[CHUNK][SLOTS];   /* summed over the task's blocks */
    vec dh[GROUP][STATE], dA[GROUP][STATE], dD[GROUP];
} Work;

INLINE void recompute_chunk(const Scan *s, Work *w, int64_t b, int64_t start, int64_t length, int64_t block, int lanes,
                            const vec *a2) {
    int64_t c = block * LANES, chunks = ceiling(s->steps, CHUNK), blocks = ceiling(s->channels, LANES);
    vec h[STATE], d_skip = load(s->D + c, lanes);
    memcpy(h, s->saved + ((b * chunks + start / CHUNK) * blocks + block) * STATE * LANES, sizeof h);
    for (int64_t j = 0; j < length; j++) {
        int64_t t = start + j, r = s->row[b * s->steps + t];
        const float keep = s->first[b * s->steps + t] ? 0.0f : 1.0f;
        const float *bias = s->bias + (s->groups > 1 ? s->group[r] * s->channels : 0) + c;
        const float *B = s->B + r * s->B_stride, *C = s->C + r * s->C_stride;
        vec u = load(s->u + r * s->u_stride + c, lanes);
        vec delta = softplus(load(s->dt + r * s->dt_stride + c, lanes) + load(bias, lanes), &w->slope[j]);
        vec input = delta * u, y = d_skip * u;
#pragma GCC unroll 16
        for (int n = 0; n < STATE; n++) {
            w->state[j][n] = h[n];
            w->decay[j][n] = power_of_two(delta * a2[n]) * keep;
            h[n] = w->decay[j][n] * h[n] + input * B[n];
            y += h[n] * C[n];
        }
        w->delta[j] = delta;
        w->y[j] = y;
    }
    memcpy(w->state[length], h, sizeof h);
}

INLINE void backward_chunk(const Scan *s, Work *w, int64_t b, int64_t start, int64_t length, int64_t block, int k,
                           int lanes, const vec *a) {
    int64_t c = block * LANES;
    vec *dh = w->dh[k], *dA = w->dA[k], d_skip = load(s->D + c, lanes);
    for (int64_t j = length - 1; j >= 0; j--) {
        int64_t t = start + j, r = s->row[b * s->steps + t];
        const float *B = s->B + r * s->B_stride, *C = s->C + r * s->C_stride;
        vec u = load(s->u + r * s->u_stride + c, lanes), z = load(s->z + r * s->z_stride + c, lanes);
        vec g = load(s->dy + r * s->channels + c, lanes), sigma = sigmoid(z);
        store(s->dz + r * s->channels + c, g * w->y[j] * sigma * (1.0f + z * (1.0f - sigma)), lanes);
        g *= z * sigma;
        vec delta = w->delta[j], input = delta * u, d_input = splat(0.0f), d_delta = splat(0.0f);
#pragma GCC unroll 16
        for (int n = 0; n < STATE; n++) {
            vec d = dh[n] + g * C[n];
            w->dC[j][n] += g * w->state[j + 1][n];
            w->dB[j][n] += d * input;
            d_input += d * B[n];
            d *= w->decay[j][n];
            vec q = d * w->state[j][n];
            dA[n] += q * delta;
            d_delta += q * a[n];
            dh[n] = d;
        }
        w->dD[k] += g * u;
        store(s->du + r * s->channels + c, g * d_skip + d_input * delta, lanes);
        vec ddt = (d_delta + d_input * u) * w->slope[j];
        store(s->ddt + r * s->channels + c, ddt, lanes);
        float *dbias = s->dbias + (b * s->groups + (s->groups > 1 ? s->group[r] : 0)) * s->channels + c;
        store(dbias, load(dbias, lanes) + ddt, lanes);
    }
}

void scan_forward(const Scan *s) {
    int64_t blocks = ceiling(s->channels, LANES);
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t task = 0; task < s->batch * blocks; task++) {
        int64_t b = task / blocks, block = task % blocks, left = s->channels - block * LANES;
        if (left >= LANES) /* a constant lets the compiler drop the partial loads */
            forward_block(s, b, block, LANES);
        else
            forward_block(s, b, block, (int)left);
    }
}

static void backward_task(const Scan *s, Work *w, int64_t b, int64_t group) {
    int64_t blocks = ceiling(s->channels, LANES), begin = group * GROUP;
    int64_t end = begin + GROUP < blocks ? begin + GROUP : blocks, all = s->channels * STATE;
    memset(w->dA, 0, sizeof w->dA);
    memset(w->dD, 0, sizeof w->dD);
    memset(w->dB, 0, sizeof w->dB);
    memset(w->dC, 0, sizeof w->dC);
    for (int64_t block = begin; block < end; block++) {
        int64_t left = s->channels - block * LANES;
        load_states(w->dh[block - begin], s->dfinal ? s->dfinal + b * all : NULL, block * LANES,
                    left < LANES ? (int)left : LANES);
    }
    for (int64_t chunk = ceiling(s->count[b], CHUNK) - 1; chunk >= 0; chunk--) {
        int64_t start = chunk * CHUNK, length = s->count[b] - start < CHUNK ? s->count[b] - start : CHUNK;
        for (int64_t block = begin; block < end; block++) {
            int64_t left = s->channels - block * LANES;
            vec a[STATE], a2[STATE];
            load_states(a, s->A, block * LANES, left < LANES ? (int)left : LANES);
            for (int n = 0; n < STATE; n++)
                a2[n] = a[n] * 1.442695040888963f;
            if (left >= LANES) {
                recompute_chunk(s, w, b, start, length, block, LANES, a2);
                backward_chunk(s, w, b, start, length, block, (int)(block - begin), LANES, a);
            } else {
                recompute_chunk(s, w, b, start, length, block, (int)left, a2);
                backward_chunk(s, w, b, start, length, block, (int)(block - begin), (int)left, a);
            }
        }
        for (int64_t j = 0; j < length; j++) {
            int64_t r = s->row[b * s->steps + start + j];
            for (int n = 0; n < STATE; n += LANES) {
                int width = STATE - n < LANES ? STATE - n : LANES;
                store(s->dB + (group * s->rows + r) * STATE + n, sum_each(&w->dB[j][n]), width);
                store(s->dC + (group * s->rows + r) * STATE + n, sum_each(&w->dC[j][n]), width);
            }
            memset(w->dB[j], 0, sizeof w->dB[j]);
            memset(w->dC[j], 0, sizeof w->dC[j]);
        }
    }
    for (int64_t block = begin; block < end; block++) {
        int64_t k = block - begin, c = block * LANES, left = s->channels - c;
        int lanes = left < LANES ? (int)left : LANES;
        store_states(s->dA + b * all, w->dA[k], c, lanes);
        store_states(s->dinitial + b * all, w->dh[k], c, lanes);
        store(s->dD + b * s->channels + c, w->dD[k], lanes);
    }
}

/* 0, or 1 where there is no memory. */
int scan_backward(const Scan *s) {
    int64_t groups = ceiling(ceiling(s->channels, LANES), GROUP);
    int failed = 0;
#pragma omp parallel num_threads(s->threads) reduction(| : failed)
    {
        Work *w = aligned_alloc(sizeof(vec), sizeof *w);
        failed |= !w;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s->batch * groups; task++)
            if (w)
                backward_task(s, w, task / groups, task % groups);
        free(w);
    }
    return failed;
}
