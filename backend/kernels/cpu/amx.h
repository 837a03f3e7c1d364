/* AMX, where the compiler was told of it and the system gives it: the registers and how to ask for them. */
#ifndef SURI_AMX_H
#define SURI_AMX_H
#include <stdint.h>

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && \
    defined(__AVX512BF16__) && defined(__linux__) && !defined(SURI_PORTABLE)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MATRIX 1

/* The system gives the large registers to those who ask; once for the process. */
static inline int matrix_allowed(void) {
    static _Atomic int known; /* 0: not asked yet */
    if (!known) known = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0 ? 1 : -1;
    return known > 0;
}

struct matrix_registers {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* The intrinsic does not tell the compiler that all of it is read. */
static inline void matrix_configure(const struct matrix_registers *registers) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*registers));
}

/* Eight registers of 16 rows of 64 bytes. */
static inline void matrix_whole(void) {
    struct matrix_registers registers = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    matrix_configure(&registers);
}

static inline void matrix_end(void) { _tile_release(); }
#else
#define MATRIX 0
static inline int matrix_allowed(void) { return 0; }
#endif
#endif
