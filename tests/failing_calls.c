/* System calls that fail, preloaded into a child process (LD_PRELOAD). The child sets a plan through `plan_failures`:
   calls of one kind on a file whose path contains `part` fail with `error`, from the `first` of them on, `times` of
   them. Build: cc -shared -fPIC -o failing_calls.so failing_calls.c */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <unistd.h>

enum kind { NONE, SYNC, UNLOCK, CLOSE, WRITE };

static enum kind planned;
static char planned_part[256];
static long first_call, last_call, seen, failed;
static int planned_error;

void plan_failures(int kind, const char *part, long first, long times, int error)
{
    planned = NONE;
    snprintf(planned_part, sizeof planned_part, "%s", part);
    first_call = first;
    last_call = first + times - 1;
    planned_error = error;
    seen = failed = 0;
    planned = kind;
}

long failures(void) { return failed; }

static int fails(enum kind kind, int descriptor)
{
    char link[64], path[4096];
    ssize_t length;

    if (kind != planned)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    if (!strstr(path, planned_part) || ++seen < first_call || seen > last_call)
        return 0;
    failed++;
    errno = planned_error;
    return 1;
}

int fsync(int descriptor) { return fails(SYNC, descriptor) ? -1 : syscall(SYS_fsync, descriptor); }
int fdatasync(int descriptor) { return fails(SYNC, descriptor) ? -1 : syscall(SYS_fdatasync, descriptor); }

ssize_t write(int descriptor, const void *bytes, size_t size)
{
    return fails(WRITE, descriptor) ? -1 : syscall(SYS_write, descriptor, bytes, size);
}
ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t offset)
{
    return fails(WRITE, descriptor) ? -1 : syscall(SYS_pwrite64, descriptor, bytes, size, offset);
}
ssize_t pwrite(int descriptor, const void *bytes, size_t size, off_t offset)
{
    return pwrite64(descriptor, bytes, size, offset);
}

int flock(int descriptor, int operation)
{
    return operation & LOCK_UN && fails(UNLOCK, descriptor) ? -1 : syscall(SYS_flock, descriptor, operation);
}

/* SQLite's own locks (F_SETLK) are left alone. */
static int control(int descriptor, int command, void *argument)
{
    if (command == F_OFD_SETLK && ((struct flock *)argument)->l_type == F_UNLCK && fails(UNLOCK, descriptor))
        return -1;
    return syscall(SYS_fcntl, descriptor, command, argument);
}
#define CONTROL(name) \
    int name(int descriptor, int command, ...) \
    { \
        va_list arguments; \
        va_start(arguments, command); \
        void *argument = va_arg(arguments, void *); \
        va_end(arguments); \
        return control(descriptor, command, argument); \
    }
CONTROL(fcntl)
CONTROL(fcntl64)

/* As Linux does, a close that fails frees the descriptor all the same (close(2)). */
int close(int descriptor)
{
    int is_failing = fails(CLOSE, descriptor), error = errno;
    int result = syscall(SYS_close, descriptor);
    if (!is_failing)
        return result;
    errno = error;
    return -1;
}
