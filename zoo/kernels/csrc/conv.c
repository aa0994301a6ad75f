/* The causal depthwise convolution before a scan, with SiLU, as `reference.causal_conv1d` defines it; fp32.
 *
 * Tokens are stepped through by the row that holds them. Work is split by (sequence, WIDTH channels), whatever the number
 * of threads, so that sums have one order.
 *
 * -DTAPS=k is the length of the filter.
 */
#include "vector.h"

#define WIDTH 128
#define BLOCKS (WIDTH / LANES)

typedef struct {
    int64_t threads, batch, steps, channels;
    const int64_t *row;   /* (batch, steps) */
    const uint8_t *first; /* (batch, steps) */
    const int64_t *count; /* (batch) */
    const float *x;       /* (rows, channels), x_stride apart */
    int64_t x_stride;
    const float *weight, *bias; /* (channels, TAPS), (channels) */
    float *y;                   /* (rows, channels) */
    /* backward alone */
    const float *dy;
    float *dx;              /* (rows, channels) */
    float *dweight, *dbias; /* (batch, channels, TAPS), (batch, channels) */
} Conv;

/* Filter of the channels from c, the tap of the newest token first; lanes past the end are 0. */
INLINE void load_filter(const Conv *s, vec (*weight)[TAPS], vec *bias, int64_t c) {
    for (int k = 0; k < BLOCKS; k++) {
        int64_t left = s->channels - c - k * LANES;
        bias[k] = splat(0.0f);
        for (int j = 0; j < TAPS; j++)
            weight[k][j] = splat(0.0f);
        for (int i = 0; i < LANES && i < left; i++) {
            bias[k][i] = s->bias[c + k * LANES + i];
            for (int j = 0; j < TAPS; j++)
                weight[k][j][i] = s->weight[(c + k * LANES + i) * TAPS + TAPS - 1 - j];
        }
    }
}

/* How many earlier tokens the filter reaches at step t, given how many it reached before. */
INLINE int reach(const Conv *s, int64_t b, int64_t t, int before) {
    if (t == 0 || s->first[b * s->steps + t])
        return 0;
    return before + 1 < TAPS ? before + 1 : TAPS - 1;
}

INLINE void forward_block(const Conv *s, const int64_t *row, int depth, const vec *weight, vec bias, int64_t c,
                          int lanes) {
    for (int j = 0; j <= depth; j++)
        bias += weight[j] * load(s->x + row[-j] * s->x_stride + c, lanes);
    store(s->y + row[0] * s->channels + c, bias * sigmoid(bias), lanes);
}

static void forward_task(const Conv *s, int64_t b, int64_t c) {
    vec weight[BLOCKS][TAPS], bias[BLOCKS];
    load_filter(s, weight, bias, c);
    int depth = 0;
    for (int64_t t = 0; t < s->count[b]; t++) {
        const int64_t *row = s->row + b * s->steps + t;
        depth = reach(s, b, t, depth);
        for (int k = 0; k < BLOCKS && c + k * LANES < s->channels; k++) {
            int64_t at = c + k * LANES, left = s->channels - at;
            if (left < LANES)
                forward_block(s, row, depth, weight[k], bias[k], at, (int)left);
            else if (depth == TAPS - 1) /* constants let the compiler unroll */
                forward_block(s, row, TAPS - 1, weight[k], bias[k], at, LANES);
            else
                forward_block(s, row, depth, weight[k], bias[k], at, LANES);
        }
    }
}

void conv_forward(const Conv *s) {
    int64_t parts = (s->channels + WIDTH - 1) / WIDTH;
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t task = 0; task < s->batch * parts; task++)
        forward_task(s, task / parts, task % parts * WIDTH);
}

/* dx of a token is written when it is the newest, and added to while the filter still reaches it. */
INLINE void backward_block(const Conv *s, const int64_t *row, int depth, const vec *weight, vec bias, vec *dweight,
                           vec *dbias, int64_t c, int lanes) {
    vec x[TAPS], sum = bias;
    for (int j = 0; j <= depth; j++) {
        x[j] = load(s->x + row[-j] * s->x_stride + c, lanes);
        sum += weight[j] * x[j];
    }
    vec sigma = sigmoid(sum);
    vec d = load(s->dy + row[0] * s->channels + c, lanes) * sigma * (1.0f + sum * (1.0f - sigma));
    *dbias += d;
    for (int j = 0; j <= depth; j++) {
        float *dx = s->dx + row[-j] * s->channels + c;
        dweight[j] += d * x[j];
        store(dx, j ? load(dx, lanes) + weight[j] * d : weight[j] * d, lanes);
    }
}

static void backward_task(const Conv *s, int64_t b, int64_t c) {
    vec weight[BLOCKS][TAPS], bias[BLOCKS], dweight[BLOCKS][TAPS] = {{{0}}}, dbias[BLOCKS] = {{0}};
    load_filter(s, weight, bias, c);
    int depth = 0;
    for (int64_t t = 0; t < s->count[b]; t++) {
        const int64_t *row = s->row + b * s->steps + t;
        depth = reach(s, b, t, depth);
        for (int k = 0; k < BLOCKS && c + k * LANES < s->channels; k++) {
            int64_t at = c + k * LANES, left = s->channels - at;
            if (left < LANES)
                backward_block(s, row, depth, weight[k], bias[k], dweight[k], &dbias[k], at, (int)left);
            else if (depth == TAPS - 1)
                backward_block(s, row, TAPS - 1, weight[k], bias[k], dweight[k], &dbias[k], at, LANES);
            else
                backward_block(s, row, depth, weight[k], bias[k], dweight[k], &dbias[k], at, LANES);
        }
    }
    for (int64_t i = 0; i < WIDTH && c + i < s->channels; i++) {
        s->dbias[b * s->channels + c + i] = dbias[i / LANES][i % LANES];
        for (int j = 0; j < TAPS; j++)
            s->dweight[(b * s->channels + c + i) * TAPS + TAPS - 1 - j] = dweight[i / LANES][j][i % LANES];
    }
}

void conv_backward(const Conv *s) {
    int64_t parts = (s->channels + WIDTH - 1) / WIDTH;
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t task = 0; task < s->batch * parts; task++)
        backward_task(s, task / parts, task % parts * WIDTH);
}
