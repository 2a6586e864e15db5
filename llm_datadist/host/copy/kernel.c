/* Copies that go past the caches; see copy/kernel.h for when they pay. */
#include "copy/kernel.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LINE 64u

#if defined(__x86_64__)

/* 512-bit stores were tried and gain nothing over these, and software prefetch loses; see copy/kernel.h for where. */
__attribute__((target("avx2"))) static void copy_stream_avx2(uint8_t *dst, const uint8_t *src, size_t n) {
    size_t head = (size_t)(-(uintptr_t)dst & (LINE - 1));
    memcpy(dst, src, head);
    dst += head;
    src += head;
    n -= head;
    while (n >= 2 * LINE) {
        __m256i a = _mm256_loadu_si256((const __m256i *)src);
        __m256i b = _mm256_loadu_si256((const __m256i *)(src + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(src + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(src + 96));
        _mm256_stream_si256((__m256i *)dst, a);
        _mm256_stream_si256((__m256i *)(dst + 32), b);
        _mm256_stream_si256((__m256i *)(dst + 64), c);
        _mm256_stream_si256((__m256i *)(dst + 96), d);
        dst += 2 * LINE;
        src += 2 * LINE;
        n -= 2 * LINE;
    }
    _mm_sfence(); /* streaming stores are weakly ordered: whoever is told "done" must see them */
    memcpy(dst, src, n);
}

void copy_stream(void *dst, const void *src, size_t n) {
    if (n >= 4 * LINE && __builtin_cpu_supports("avx2")) {
        copy_stream_avx2(dst, src, n);
    } else {
        memcpy(dst, src, n);
    }
}

#elif defined(__aarch64__)

void copy_stream(void *dst, const void *src, size_t n) {
    uint8_t *to = dst;
    const uint8_t *from = src;
    size_t head = (size_t)(-(uintptr_t)to & (LINE - 1));
    if (n < 4 * LINE) {
        memcpy(dst, src, n);
        return;
    }
    memcpy(to, from, head);
    to += head;
    from += head;
    n -= head;
    while (n >= LINE) {
        __asm__ volatile("ldp q0, q1, [%1]\n\t"
                         "ldp q2, q3, [%1, #32]\n\t"
                         "stnp q0, q1, [%0]\n\t"
                         "stnp q2, q3, [%0, #32]"
                         :
                         : "r"(to), "r"(from)
                         : "v0", "v1", "v2", "v3", "memory");
        to += LINE;
        from += LINE;
        n -= LINE;
    }
    memcpy(to, from, n); /* a non-temporal pair is a hint there: ordinary ordering rules hold, no fence needed */
}

#else

void copy_stream(void *dst, const void *src, size_t n) {
    memcpy(dst, src, n);
}

#endif
