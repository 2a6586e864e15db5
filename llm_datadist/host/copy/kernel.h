/* Plain memory copies, ordinary or with non-temporal stores. */
#ifndef LLM_DATADIST_COPY_KERNEL_H
#define LLM_DATADIST_COPY_KERNEL_H

#include <stddef.h>

/*
 * When streaming pays, measured on a 2-core AMD EPYC (AVX-512, 32 MiB L3) between two memfd mappings:
 * - Segment size. With cold destinations streaming wins from 1 KiB segments on (1 KiB 1.5x, 4 KiB 1.3x,
 *   64 KiB 1.4x, 1 MiB 1.7x of memcpy): no line of the destination is read first. Below, the head and tail
 *   that share a cache line eat the gain.
 * - Batch size. Up to about 1 MiB the destination tends to be in, and is wanted in, the cache: copying and
 *   then reading it costs twice as much after streaming when it was hot, and the same when it was cold.
 */
#define COPY_STREAM_MIN_SEGMENT ((size_t)1 << 10)
#define COPY_STREAM_MIN_BATCH ((size_t)1 << 20)

/* Copy with stores that bypass the cache where the CPU has them; [dst, dst + n) and [src, src + n) are apart. */
void copy_stream(void *dst, const void *src, size_t n);

#endif
