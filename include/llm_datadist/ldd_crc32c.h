/*
 * CRC32C (Castagnoli, RFC 3720), by the processor's instruction where it has one.
 *
 * One instruction takes three cycles and can be begun every cycle, so long data is read as three lanes at once, whose
 * registers are joined afterwards: what one lane's length of zero bytes would make of a register is a linear map, kept
 * as four tables.
 */
#ifndef LLM_DATADIST_LDD_CRC32C_H
#define LLM_DATADIST_LDD_CRC32C_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __aarch64__
#include <sys/auxv.h>
#endif

#define LDD_CRC32C_POLYNOMIAL UINT32_C(0x82f63b78) /* bits reversed */
enum { LDD_CRC32C_LANE = 1024 };                   /* bytes, a multiple of 8 */

static struct {
    uint32_t bytes[8][256];  /* [k][b]: byte b followed by k zero bytes */
    uint32_t shifts[4][256]; /* [k][b]: the register b << 8k after a lane of zero bytes */
    int has_instruction;
} ldd_crc32c_state;
static pthread_once_t ldd_crc32c_once = PTHREAD_ONCE_INIT;

/* Every function takes the register and returns it, without the inversions at both ends. */
static inline uint32_t ldd_crc32c_by_table(uint32_t crc, const uint8_t *data, size_t nbytes) {
    const uint32_t (*t)[256] = (const uint32_t (*)[256])ldd_crc32c_state.bytes;
    uint64_t word;
    for (; nbytes >= 8; data += 8, nbytes -= 8) {
        memcpy(&word, data, 8);
        word ^= crc;
        crc = t[7][word & 255] ^ t[6][word >> 8 & 255] ^ t[5][word >> 16 & 255] ^ t[4][word >> 24 & 255] ^
              t[3][word >> 32 & 255] ^ t[2][word >> 40 & 255] ^ t[1][word >> 48 & 255] ^ t[0][word >> 56];
    }
    for (; nbytes; data++, nbytes--)
        crc = t[0][(crc ^ *data) & 255] ^ crc >> 8;
    return crc;
}

static inline uint32_t ldd_crc32c_shift(uint32_t crc) {
    const uint32_t (*t)[256] = (const uint32_t (*)[256])ldd_crc32c_state.shifts;
    return t[0][crc & 255] ^ t[1][crc >> 8 & 255] ^ t[2][crc >> 16 & 255] ^ t[3][crc >> 24];
}

#if defined(__x86_64__)
#define LDD_CRC32C_TARGET __attribute__((target("sse4.2")))
#define LDD_CRC32C_WORD(crc, word) ((crc) = (uint32_t)__builtin_ia32_crc32di((crc), (word)))
#define LDD_CRC32C_BYTE(crc, byte) ((crc) = __builtin_ia32_crc32qi((crc), (byte)))
#elif defined(__aarch64__)
#define LDD_CRC32C_TARGET
#define LDD_CRC32C_WORD(crc, word) __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(word))
#define LDD_CRC32C_BYTE(crc, byte) \
    __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"((uint32_t)(byte)))
#endif

#ifdef LDD_CRC32C_TARGET
LDD_CRC32C_TARGET static inline uint32_t ldd_crc32c_by_instruction(uint32_t crc, const uint8_t *data, size_t nbytes) {
    uint64_t words[3];
    uint32_t second, third;
    size_t i;
    for (; nbytes >= 3 * LDD_CRC32C_LANE; data += 3 * LDD_CRC32C_LANE, nbytes -= 3 * LDD_CRC32C_LANE) {
        second = third = 0;
        for (i = 0; i < LDD_CRC32C_LANE; i += 8) {
            memcpy(&words[0], data + i, 8);
            memcpy(&words[1], data + LDD_CRC32C_LANE + i, 8);
            memcpy(&words[2], data + 2 * LDD_CRC32C_LANE + i, 8);
            LDD_CRC32C_WORD(crc, words[0]);
            LDD_CRC32C_WORD(second, words[1]);
            LDD_CRC32C_WORD(third, words[2]);
        }
        crc = ldd_crc32c_shift(ldd_crc32c_shift(crc) ^ second) ^ third;
    }
    for (; nbytes >= 8; data += 8, nbytes -= 8) {
        memcpy(&words[0], data, 8);
        LDD_CRC32C_WORD(crc, words[0]);
    }
    for (; nbytes; data++, nbytes--)
        LDD_CRC32C_BYTE(crc, *data);
    return crc;
}
#endif

static inline void ldd_crc32c_prepare(void) {
    static const uint8_t zeros[LDD_CRC32C_LANE];
    uint32_t crc, bits[32];
    int i, k;
    for (i = 0; i < 256; i++) {
        for (crc = (uint32_t)i, k = 0; k < 8; k++)
            crc = crc >> 1 ^ (crc & 1 ? LDD_CRC32C_POLYNOMIAL : 0);
        ldd_crc32c_state.bytes[0][i] = crc;
    }
    for (k = 1; k < 8; k++)
        for (i = 0; i < 256; i++) {
            crc = ldd_crc32c_state.bytes[k - 1][i];
            ldd_crc32c_state.bytes[k][i] = ldd_crc32c_state.bytes[0][crc & 255] ^ crc >> 8;
        }
    for (k = 0; k < 32; k++)
        bits[k] = ldd_crc32c_by_table(UINT32_C(1) << k, zeros, sizeof zeros);
    for (k = 0; k < 4; k++)
        for (i = 1; i < 256; i++)
            ldd_crc32c_state.shifts[k][i] =
                ldd_crc32c_state.shifts[k][i & (i - 1)] ^ bits[8 * k + __builtin_ctz((unsigned)i)];
#if defined(__x86_64__)
    ldd_crc32c_state.has_instruction = __builtin_cpu_supports("sse4.2") != 0;
#elif defined(__aarch64__)
    ldd_crc32c_state.has_instruction = (getauxval(AT_HWCAP) & 1u << 7) != 0; /* HWCAP_CRC32 */
#endif
}

/* `by_table` leaves the instruction alone, also where there is one. */
static inline uint32_t ldd_crc32c_of(const void *data, size_t nbytes, int by_table) {
    pthread_once(&ldd_crc32c_once, ldd_crc32c_prepare);
#ifdef LDD_CRC32C_TARGET
    if (ldd_crc32c_state.has_instruction && !by_table)
        return ~ldd_crc32c_by_instruction(UINT32_MAX, (const uint8_t *)data, nbytes);
#else
    (void)by_table;
#endif
    return ~ldd_crc32c_by_table(UINT32_MAX, (const uint8_t *)data, nbytes);
}

#endif
