/* How long the system lets a thread compute before others of the same priority have their turn. */
#ifndef SURI_SLICE_H
#define SURI_SLICE_H

/* Ask for long turns for the calling thread; the threads that it starts later have them too.
 *
 * Linux from 6.12 on gives who asks for long slices (`sched_runtime` of sched_setattr(2), 0.1 to 100 ms) the same share
 * of the processors in fewer pieces, and lets a thread of shorter slices that wakes up go first
 * (Documentation/scheduler/sched-eevdf.rst). So what hands out the tokens, and the rest of the machine, need not wait
 * until computing threads stop, and these are stopped less often in the middle of a step, where each waits for the
 * others. Needs no privilege; nothing else about the thread is changed, and elsewhere nothing at all. */
void suri_long_slice(void);
#endif
