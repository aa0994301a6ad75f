/* Vectors of 16 floats, and exp, softplus and the sigmoid of them.
 *
 * GCC's vector extension: one AVX-512 register, or several smaller ones elsewhere. Nothing here may be compiled with
 * -ffast-math: it deletes the rounding by a magic number, and the exponential is then wrong by 0.8 without a warning.
 * What is not finite becomes NaN, so that a bad step is seen.
 */
#ifndef ZOO_VECTOR_H
#define ZOO_VECTOR_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

INLINE vec splat(float x) {
    return x - (vec){0};
}

/* The first `lanes` floats at p; the other lanes are 0. */
INLINE vec load(const float *p, int lanes) {
    vec x = {0};
    if (lanes == LANES)
        memcpy(&x, p, sizeof x);
    else
        for (int i = 0; i < lanes; i++)
            x[i] = p[i];
    return x;
}

INLINE void store(float *p, vec x, int lanes) {
    if (lanes == LANES)
        memcpy(p, &x, sizeof x);
    else
        for (int i = 0; i < lanes; i++)
            p[i] = x[i];
}

INLINE vec choose(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

INLINE vec magnitude(vec x) {
    return (vec)((ivec)x & 0x7fffffff);
}

/* 2^r for r in [-0.5, 0.5], to 2e-8 (minimax polynomial, Cephes' coefficients). */
INLINE vec exp2_fraction(vec r) {
    vec p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    return p * r + 1.0f;
}

INLINE vec nearest(vec x) {
#ifdef __AVX512F__
    return (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const float magic = 12582912.0f; /* 1.5 * 2^23: the sum has no room for a fraction */
    return (x + magic) - magic;
#endif
}

/* p * 2^n for integers n; 0 far below the range. */
INLINE vec scale(vec p, vec n) {
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vec bounded = choose(n < splat(-126.0f), splat(-126.0f), n);
    bounded = choose(bounded > splat(127.0f), splat(127.0f), bounded);
    ivec bits = (__builtin_convertvector(bounded, ivec) + 127) << 23;
    return choose(n < splat(-126.0f), p * 0.0f, p * (vec)bits);
#endif
}

/* 2^x; the exponent's own rounding is the error, as it is of exp(a * b) in any fp32 code. */
INLINE vec power_of_two(vec x) {
    vec n = nearest(x);
    return scale(exp2_fraction(x - n), n);
}

/* e^x to two units in the last place. */
INLINE vec exponential(vec x) {
    vec n = nearest(x * 1.442695040888963f);
    vec r = x - n * 0.693145751953125f; /* exact product: the constant has 11 bits */
    r = r - n * 1.428606820309417e-6f;
    return scale(exp2_fraction(r * 1.442695040888963f), n);
}

/* log(1 + e^x) and its derivative, accurate relative to their own size for any x. */
INLINE vec softplus(vec x, vec *derivative) {
    vec e = exponential(-magnitude(x)); /* in [0, 1] */
    vec sigma = 1.0f / (1.0f + e);
    *derivative = choose(x < 0.0f, e * sigma, sigma);
    vec s = e / (2.0f + e), q = s * s; /* log(1 + e) = 2 artanh(e / (2 + e)), |s| <= 1/3 */
    vec p = q * (1.0f / 17) + (1.0f / 15);
    p = p * q + (1.0f / 13);
    p = p * q + (1.0f / 11);
    p = p * q + (1.0f / 9);
    p = p * q + (1.0f / 7);
    p = p * q + (1.0f / 5);
    p = p * q + (1.0f / 3);
    return choose(x > 0.0f, x, splat(0.0f)) + 2.0f * (s + s * q * p);
}

INLINE vec sigmoid(vec x) {
    vec e = exponential(-magnitude(x));
    vec sigma = 1.0f / (1.0f + e);
    return choose(x < 0.0f, e * sigma, sigma);
}

INLINE float sum_lanes(vec x) {
    float total = 0.0f;
    for (int i = 0; i < LANES; i++)
        total += x[i];
    return total;
}

/* Lane l of the result is the sum of the lanes of v[l], for 16 vectors. */
INLINE vec sum_each(const vec *v) {
    vec r[8];
#define FOLD(count, from, step, i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15)                   \
    for (int i = 0; i < count; i++) {                                                                                 \
        vec a = from[i], b = from[i + step];                                                                          \
        r[i] = __builtin_shufflevector(a, b, i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15) +   \
               __builtin_shufflevector(a, b, (i0) ^ step, (i1) ^ step, (i2) ^ step, (i3) ^ step, (i4) ^ step,         \
                                       (i5) ^ step, (i6) ^ step, (i7) ^ step, (i8) ^ step, (i9) ^ step,               \
                                       (i10) ^ step, (i11) ^ step, (i12) ^ step, (i13) ^ step, (i14) ^ step,          \
                                       (i15) ^ step);                                                                 \
    }
    FOLD(8, v, 8, 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31)
    FOLD(4, r, 4, 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31)
    FOLD(2, r, 2, 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31)
    FOLD(1, r, 1, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31)
#undef FOLD
    return r[0];
}

/* Scratch of n vectors, aligned; the caller frees it. */
INLINE vec *scratch(size_t n) {
    return aligned_alloc(sizeof(vec), n * sizeof(vec));
}

#endif
