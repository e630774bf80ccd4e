/* Fails the n-th call below a folder, whoever in the process makes it; loaded by LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long left = -1, seen;
static int code, lasting;

/* Count from now on; an empty root ends it. */
void failing_arm(const char *folder, long number, int error, int all) {
    snprintf(root, sizeof root, "%s", folder);
    left = number;
    seen = 0;
    code = error;
    lasting = all;
}

long failing_seen(void) { return seen; }

static int below(const char *path) { return root[0] && path && !strncmp(path, root, strlen(root)); }

static int fails(int counted) {
    if (!counted) return 0;
    seen++;
    left--;
    if (left == 0 || (left < 0 && lasting)) {
        errno = code;
        return 1;
    }
    return 0;
}

static int of_path(const char *path) { return fails(below(path)); }

static int of_handle(int handle) {
    char link[64], path[PATH_MAX];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(below(path));
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(result, name, parameters, arguments, failed) \
    result name parameters { return (failed) ? -1 : REAL(name) arguments; }

WRAP(ssize_t, write, (int h, const void *b, size_t n), (h, b, n), of_handle(h))
WRAP(ssize_t, pwrite64, (int h, const void *b, size_t n, off_t o), (h, b, n, o), of_handle(h))
WRAP(ssize_t, read, (int h, void *b, size_t n), (h, b, n), of_handle(h))
WRAP(int, fsync, (int h), (h), of_handle(h))
WRAP(int, ftruncate64, (int h, off_t n), (h, n), of_handle(h))
WRAP(int, fchmod, (int h, mode_t m), (h, m), of_handle(h))
WRAP(int, rename, (const char *a, const char *b), (a, b), of_path(a))
WRAP(int, unlink, (const char *a), (a), of_path(a))
WRAP(int, unlinkat, (int d, const char *a, int f), (d, a, f), *a == '/' ? of_path(a) : of_handle(d))
WRAP(int, rmdir, (const char *a), (a), of_path(a))
WRAP(int, mkdir, (const char *a, mode_t m), (a, m), of_path(a))
WRAP(int, link, (const char *a, const char *b), (a, b), of_path(b))
WRAP(int, chmod, (const char *a, mode_t m), (a, m), of_path(a))

/* It returns its error. */
int posix_fallocate64(int h, off_t o, off_t n) {
    return of_handle(h) ? code : REAL(posix_fallocate64)(h, o, n);
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    return of_path(path) ? -1 : REAL(open64)(path, flags, mode);
}
