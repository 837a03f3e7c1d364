#include "pool.h"
#include "slice.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum { MAX_THREADS = 256, LOOK_OUT = 1000 /* pauses: some 25 to 60 microseconds */, PATIENCE = 4000 };
#define OPEN ((uint64_t)1 << 16)
#define GENERATION ((uint64_t)1 << 17)

static struct {
    pthread_mutex_t lock; /* of sleepers and started */
    pthread_cond_t wake;
    int started, sleepers;
    _Atomic uint64_t state; /* generation, OPEN, and in the low 16 bits how many helpers are in */
    atomic_flag busy;
    /* the job */
    suri_work work;
    const void *argument;
    int64_t chunk;
    int helpers;
    struct {
        _Alignas(128) _Atomic int64_t next;
        int64_t end;
    } range[MAX_THREADS + 1]; /* what each thread begins with */
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, 0, ATOMIC_FLAG_INIT, 0, 0, 0, 0, {{0}}};

static _Atomic uint64_t all_jobs, shared_jobs;

void suri_jobs(uint64_t *all, uint64_t *shared) {
    *all = atomic_load(&all_jobs);
    *shared = atomic_load(&shared_jobs);
}

static inline void rest(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Its own range first, then what others have left. Jobs follow each other on the same arrays: a thread that writes where
 * it wrote before finds the lines in its cache, and need not wait until another processor hands them over. */
static void take_part(int number) {
    for (int n = 0; n <= pool.helpers; n++) {
        int of = number + n <= pool.helpers ? number + n : number + n - pool.helpers - 1;
        for (;;) {
            int64_t first = atomic_fetch_add_explicit(&pool.range[of].next, pool.chunk, memory_order_relaxed);
            if (first >= pool.range[of].end) break;
            int64_t last = first + pool.chunk;
            pool.work(pool.argument, first, last < pool.range[of].end ? last : pool.range[of].end);
        }
    }
}

static void *helper(void *number) {
    uint64_t seen = 0;
    suri_long_slice();
    for (;;) {
        uint64_t state = atomic_load(&pool.state);
        for (int n = 0; n < LOOK_OUT && state / GENERATION == seen; n++) {
            rest();
            state = atomic_load(&pool.state);
        }
        if (state / GENERATION == seen) {
            pthread_mutex_lock(&pool.lock);
            pool.sleepers++;
            while ((state = atomic_load(&pool.state)) / GENERATION == seen) pthread_cond_wait(&pool.wake, &pool.lock);
            pool.sleepers--;
            pthread_mutex_unlock(&pool.lock);
        }
        seen = state / GENERATION;
        /* Go in while the job is open; after that its fields stay until we are out again. */
        while (state & OPEN && state / GENERATION == seen) {
            if (!atomic_compare_exchange_weak(&pool.state, &state, state + 1)) continue;
            if ((intptr_t)number < pool.helpers) take_part((int)(intptr_t)number + 1);
            atomic_fetch_sub(&pool.state, 1);
            break;
        }
    }
    return 0;
}

static void after_fork(void) { /* the child has none of the threads */
    pthread_mutex_init(&pool.lock, 0);
    pthread_cond_init(&pool.wake, 0);
    pool.started = pool.sleepers = 0;
    atomic_store(&pool.state, 0);
    atomic_flag_clear(&pool.busy);
}

static void register_fork(void) { pthread_atfork(0, 0, after_fork); }

/* How many helpers there are when up to `wanted` are asked for. */
static int start(int wanted) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (wanted > MAX_THREADS) wanted = MAX_THREADS;
    if (pool.started >= wanted) return wanted;
    pthread_once(&once, register_fork);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (pool.started < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, helper, (void *)(intptr_t)pool.started)) break;
        pool.started++;
    }
    pthread_attr_destroy(&attributes);
    return pool.started < wanted ? pool.started : wanted;
}

void suri_parallel(int threads, int64_t count, int64_t chunk, suri_work work, const void *argument) {
    int64_t pieces = (count + chunk - 1) / chunk;
    atomic_fetch_add_explicit(&all_jobs, 1, memory_order_relaxed);
    if (threads > pieces) threads = (int)pieces;
    if (threads <= 1 || atomic_flag_test_and_set(&pool.busy)) {
        if (count > 0) work(argument, 0, count);
        return;
    }
    atomic_fetch_add_explicit(&shared_jobs, 1, memory_order_relaxed);
    pool.helpers = start(threads - 1);
    threads = pool.helpers + 1;
    pool.work = work, pool.argument = argument, pool.chunk = chunk;
    const int64_t unit = chunk % 2 ? 1 : 2; /* work that is done by twos stays so */
    for (int n = 0; n < threads; n++) {
        atomic_store_explicit(&pool.range[n].next, count * n / threads / unit * unit, memory_order_relaxed);
        pool.range[n].end = n + 1 == threads ? count : count * (n + 1) / threads / unit * unit;
    }
    /* A new generation, open and empty. No helper is in: the last job ended with that. */
    atomic_store(&pool.state, (atomic_load(&pool.state) / GENERATION + 1) * GENERATION | OPEN);
    pthread_mutex_lock(&pool.lock);
    if (pool.sleepers) pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_part(0);
    uint64_t state = atomic_fetch_and(&pool.state, ~OPEN);
    for (int n = 0; state & (OPEN - 1); state = atomic_load(&pool.state))
        if (++n < PATIENCE) rest();
        else sched_yield();
    atomic_flag_clear(&pool.busy);
}
