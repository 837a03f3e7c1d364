#define _GNU_SOURCE
#include "slice.h"

#ifdef __linux__
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SLICE = 20000000 /* nanoseconds: some steps of a small model; by default it is 3 ms or so */ };

/* As the kernel has it (linux/sched/types.h, its first version); the C library may have none, or one of its own. */
struct attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};

void suri_long_slice(void) {
    struct attributes now = {0};
    if (syscall(SYS_sched_getattr, 0, &now, sizeof now, 0)) return; /* forbidden, as in some containers: stay as we are */
    if ((now.policy != SCHED_OTHER && now.policy != SCHED_BATCH) || now.runtime >= SLICE) return;
    now.size = sizeof now;
    now.runtime = SLICE;
    (void)syscall(SYS_sched_setattr, 0, &now, 0);
}
#else
void suri_long_slice(void) {}
#endif
