/* One pool of threads for the process. Work is handed out in chunks by a counter, so a thread that the system stops for
 * a while delays only its own chunk, and one that wakes too late finds the job closed and is not waited for.
 */
#ifndef SURI_POOL_H
#define SURI_POOL_H
#include <stdint.h>

typedef void (*suri_work)(const void *argument, int64_t first, int64_t last);

/* work(argument, first, last) for 0 .. count in pieces of `chunk`, on at most `threads` threads, the caller's among
 * them; returns when all is done. May be called many times in a row, from C too: the others look out for the next job
 * for a few microseconds before they sleep. Where the pool is busy with another caller's job, the caller works alone. */
void suri_parallel(int threads, int64_t count, int64_t chunk, suri_work work, const void *argument);

/* Since the library was loaded: jobs, and those that several threads were called to, so that one had to wait for others. */
void suri_jobs(uint64_t *all, uint64_t *shared);
#endif
