// Fails one operation of the file system on purpose. Preloaded, so that it stands before every library's calls.
// faults_begin(folder, n, error): the n-th operation from now on under `folder` (0: none) answers with `error`.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { OPEN, WRITE, FSYNC, RENAME, MKDIR, LINK, UNLINK, KINDS };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX];
static long at, count, kinds[KINDS];
static int failure, failed_kind;

void faults_begin(const char* path, long n, int error) {
    pthread_mutex_lock(&lock);
    snprintf(folder, sizeof folder, "%s", path);
    at = n;
    failure = error;
    count = 0;
    failed_kind = -1;
    memset(kinds, 0, sizeof kinds);
    pthread_mutex_unlock(&lock);
}
long faults_count(int kind) { return kind < 0 ? count : kinds[kind]; }
int faults_failed(void) { return failed_kind; }

static int fails(int kind, const char* path) {
    size_t length = strlen(folder);
    if (!length || !path || strncmp(path, folder, length)) return 0;
    pthread_mutex_lock(&lock);
    kinds[kind]++;
    int now = ++count == at;
    if (now) failed_kind = kind;
    pthread_mutex_unlock(&lock);
    if (now) errno = failure;
    return now;
}

static int fails_open_file(int kind, int file) {
    char name[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(kind, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPENS(name)                                              \
    int name(const char* path, int flags, ...) {                 \
        va_list list;                                            \
        va_start(list, flags);                                   \
        mode_t mode = (flags & O_CREAT) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                            \
        return fails(OPEN, path) ? -1 : REAL(name)(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)
ssize_t write(int file, const void* data, size_t size) {
    return fails_open_file(WRITE, file) ? -1 : REAL(write)(file, data, size);
}
int fsync(int file) { return fails_open_file(FSYNC, file) ? -1 : 0; }  // the disk itself is not waited for
int rename(const char* from, const char* to) { return fails(RENAME, to) ? -1 : REAL(rename)(from, to); }
int mkdir(const char* path, mode_t mode) { return fails(MKDIR, path) ? -1 : REAL(mkdir)(path, mode); }
int link(const char* from, const char* to) { return fails(LINK, to) ? -1 : REAL(link)(from, to); }
int linkat(int a, const char* from, int b, const char* to, int flags) {
    return fails(LINK, to) ? -1 : REAL(linkat)(a, from, b, to, flags);
}
int unlink(const char* path) { return fails(UNLINK, path) ? -1 : REAL(unlink)(path); }
