/* Faults of the machine for one process: a disk that is full from the n-th write on, a wall clock that jumps.
 *
 * AUTOPRUNE_TESTS_FULL_AT=n   every write, truncation and new file below a folder "studies" fails with ENOSPC from the
 *                             n-th on; AUTOPRUNE_TESTS_WRITES names a file that gets their number.
 * AUTOPRUNE_TESTS_CLOCK=n:s   the wall clock is s seconds off from its n-th reading on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static long writes, readings;

static int refuse(void) {
    const char *at = getenv("AUTOPRUNE_TESTS_FULL_AT");
    long number = __sync_add_and_fetch(&writes, 1);
    const char *place = getenv("AUTOPRUNE_TESTS_WRITES");
    if (place && *place) {
        char text[32];
        int length = snprintf(text, sizeof text, "%ld\n", number);
        int file = syscall(SYS_openat, AT_FDCWD, place, O_WRONLY | O_CREAT | O_TRUNC, 0644);
        if (file >= 0) {
            (void)!syscall(SYS_write, file, text, length);
            syscall(SYS_close, file);
        }
    }
    if (number < atol(at)) return 0;
    errno = ENOSPC;
    return 1;
}

static int armed(void) {
    const char *at = getenv("AUTOPRUNE_TESTS_FULL_AT");
    return at && *at;
}

static int below(const char *path) { return path && strstr(path, "/studies/") != NULL; }

static int full_file(int file) {
    char link[64], path[4096];
    if (!armed()) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path) && refuse();
}

static int full_path(const char *path) { return armed() && below(path) && refuse(); }

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int file, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return full_file(file) ? -1 : real(file, data, size);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t place) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    return full_file(file) ? -1 : real(file, data, size, place);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    return full_file(file) ? -1 : real(file, data, size, place);
}

int ftruncate(int file, off_t size) {
    REAL(int, "ftruncate", int, off_t);
    return full_file(file) ? -1 : real(file, size);
}

int ftruncate64(int file, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    return full_file(file) ? -1 : real(file, size);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return full_path(path) ? -1 : real(path, mode);
}

#define OPENED(name) \
int name(const char *path, int flags, ...) { \
    REAL(int, #name, const char *, int, ...); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & O_CREAT ? va_arg(rest, int) : 0; \
    va_end(rest); \
    if ((flags & O_CREAT) && armed() && access(path, F_OK) != 0 && full_path(path)) return -1; \
    return real(path, flags, mode); \
}

OPENED(open)
OPENED(open64)

static void jump(long *seconds) {
    const char *asked = getenv("AUTOPRUNE_TESTS_CLOCK");
    if (!asked || !*asked) return;
    long at = atol(asked), number = __sync_add_and_fetch(&readings, 1);
    const char *by = strchr(asked, ':');
    if (by && number >= at) *seconds += atol(by + 1);
}

int clock_gettime(clockid_t which, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int result = real(which, now);
    if (result == 0 && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) jump(&now->tv_sec);
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL(int, "gettimeofday", struct timeval *, void *);
    int result = real(now, zone);
    if (result == 0) jump(&now->tv_sec);
    return result;
}

time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}
