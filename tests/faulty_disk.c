/* Stands between a process and its C library, and counts what it does to regular files and directory entries: each write,
 * fsync, rename, mkdir and unlink, whether Python, torch (C++) or tokenizers (Rust) asked for it. At the operation that
 * was chosen the process is killed, or the disk is full from there on. Preloaded by tests/kill_runs.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = 1, KILL_HALFWAY = 2, FULL = 3 };
static long chosen, done;
static int what;

void arm_faulty_disk(long operation, int fault) { chosen = operation; what = fault; done = 0; }
long faulty_disk_operations(void) { return done; }

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* Counts an operation; whether it has to fail. Half of a write is done before its process is killed halfway. */
static int fails(int grows, int fd, const void *bytes, size_t size) {
    static ssize_t (*real_write)(int, const void *, size_t);
    ++done;
    if (chosen == 0 || done < chosen) return 0;
    if (what == KILL && done == chosen) die();
    if (what == KILL_HALFWAY && done == chosen) {
        if (!real_write) real_write = dlsym(RTLD_NEXT, "write");
        if (bytes && real_write(fd, bytes, size / 2) < 0) die();
        die();
    }
    if (what == FULL && grows) { errno = ENOSPC; return 1; }
    return 0;
}

static int is_file(int fd) { struct stat s; return fstat(fd, &s) == 0 && S_ISREG(s.st_mode); }

#define REAL(result, name, types) \
    static result(*real) types; \
    if (!real) real = dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *bytes, size_t size) {
    REAL(ssize_t, write, (int, const void *, size_t));
    if (is_file(fd) && fails(1, fd, bytes, size)) return -1;
    return real(fd, bytes, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, (int, const struct iovec *, int));
    if (is_file(fd) && fails(1, fd, count ? parts[0].iov_base : 0, count ? parts[0].iov_len : 0)) return -1;
    return real(fd, parts, count);
}
int fsync(int fd) {
    REAL(int, fsync, (int));
    return fails(1, fd, 0, 0) ? -1 : real(fd);
}
int rename(const char *from, const char *to) {
    REAL(int, rename, (const char *, const char *));
    return fails(0, -1, 0, 0) ? -1 : real(from, to);
}
int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    REAL(int, renameat2, (int, const char *, int, const char *, unsigned));
    return fails(0, -1, 0, 0) ? -1 : real(from_folder, from, to_folder, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, (const char *, mode_t));
    return fails(1, -1, 0, 0) ? -1 : real(path, mode);
}
int unlink(const char *path) {
    REAL(int, unlink, (const char *));
    return fails(0, -1, 0, 0) ? -1 : real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(int, unlinkat, (int, const char *, int));
    return fails(0, -1, 0, 0) ? -1 : real(folder, path, flags);
}
int rmdir(const char *path) {
    REAL(int, rmdir, (const char *));
    return fails(0, -1, 0, 0) ? -1 : real(path);
}
