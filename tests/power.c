/* What a power-off would leave of a folder: at every fsync, a copy of what is on the disk from then on.
 *
 * Loaded with LD_PRELOAD; POWER_FOLDER is the folder (absolute, without links), POWER_LOG where copies go:
 *   files/KEY    the content of a file when it was last synced
 *   folders/KEY  the entries of a folder when it was last synced, a line each: KEY, f or d or o, the name
 * A KEY is an inode's number and its time of birth. See power.py.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int key_at(int at, const char *name, int flags, char *key, size_t size, mode_t *mode) {
    struct statx found;
    if (statx(at, name, flags | AT_SYMLINK_NOFOLLOW, STATX_INO | STATX_BTIME | STATX_TYPE, &found)) return -1;
    snprintf(key, size, "%llu-%lld-%u", (unsigned long long)found.stx_ino, (long long)found.stx_btime.tv_sec,
             found.stx_btime.tv_nsec);
    *mode = found.stx_mode;
    return 0;
}

static int copy_file(int from, int to) {
    char buffer[65536];
    off_t offset = 0;
    ssize_t count;
    while ((count = pread(from, buffer, sizeof buffer, offset)) > 0) {
        for (ssize_t done = 0; done < count;) {
            ssize_t written = write(to, buffer + done, count - done);
            if (written < 0) return -1;
            done += written;
        }
        offset += count;
    }
    return count < 0 ? -1 : 0;
}

static int list_folder(int from, int to) {
    int own = openat(from, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *folder = own < 0 ? NULL : fdopendir(own);
    if (!folder) return -1;
    struct dirent *entry;
    while ((entry = readdir(folder))) {
        char key[64];
        mode_t mode;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        if (key_at(own, entry->d_name, 0, key, sizeof key, &mode)) continue; /* just removed */
        dprintf(to, "%s %c %s\n", key, S_ISREG(mode) ? 'f' : S_ISDIR(mode) ? 'd' : 'o', entry->d_name);
    }
    closedir(folder);
    return 0;
}

/* Copies what the open file holds now; returns 1 with the copy's draft and final name, 0 where it is not ours. */
static int draft(int descriptor, char *drafted, char *final, size_t size) {
    const char *folder = getenv("POWER_FOLDER"), *log = getenv("POWER_LOG");
    char link[64], path[4096], key[64];
    mode_t mode;
    if (!folder || !log) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    size_t prefix = strlen(folder);
    if (strncmp(path, folder, prefix) || (path[prefix] && path[prefix] != '/')) return 0;
    if (key_at(descriptor, "", AT_EMPTY_PATH, key, sizeof key, &mode)) return 0;
    if (!S_ISREG(mode) && !S_ISDIR(mode)) return 0;
    snprintf(final, size, "%s/%s/%s", log, S_ISDIR(mode) ? "folders" : "files", key);
    snprintf(drafted, size, "%s.%d.%ld", final, getpid(), (long)syscall(SYS_gettid));
    int from = S_ISDIR(mode) ? descriptor : open(link, O_RDONLY | O_CLOEXEC);
    int to = open(drafted, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    int bad = from < 0 || to < 0 || (S_ISDIR(mode) ? list_folder(from, to) : copy_file(from, to));
    if (from >= 0 && from != descriptor) close(from);
    if (to >= 0) close(to);
    if (bad) unlink(drafted);
    return !bad;
}

static int synced(int descriptor, const char *name) {
    static _Thread_local int inside;
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    if (inside) return real(descriptor);
    char drafted[4400], final[4300];
    inside = 1;
    int before = errno;
    /* Before the sync: what is written meanwhile it need not take along. */
    int ours = draft(descriptor, drafted, final, sizeof final);
    errno = before;
    int result = real(descriptor);
    before = errno;
    if (ours) result ? unlink(drafted) : rename(drafted, final);
    errno = before;
    inside = 0;
    return result;
}

int fsync(int descriptor) { return synced(descriptor, "fsync"); }

int fdatasync(int descriptor) { return synced(descriptor, "fdatasync"); }

/* For power.py: the key of a path, 0 where that worked. */
int power_key(const char *path, char *key, int size) {
    mode_t mode;
    return key_at(AT_FDCWD, path, 0, key, size, &mode);
}
