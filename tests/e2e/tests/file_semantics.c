/* Tries what programs may expect of a file system and prints a line of each: the same on every one that is as it should
 * be. `program FOLDER`, `program hold|try|wait flock|fcntl|ofd|map FILE`, `program give|show|append|words FILE`. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static const char *err(long result) { return result < 0 ? strerrorname_np(errno) : "ok"; }
#define TRY(call) (errno = 0, err(call))

static int make(const char *name, const char *content) {
    int file = open(name, O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (file >= 0 && write(file, content, strlen(content)) < 0) return -1;
    return file;
}

static void show(const char *what, const char *name) {
    struct stat s;
    if (lstat(name, &s)) { printf("%s: %s\n", what, err(-1)); return; }
    printf("%s: %o %u:%u links %lu size %lld\n", what, s.st_mode, s.st_uid, s.st_gid, (unsigned long)s.st_nlink,
           (long long)s.st_size);
}

static void owners(void) {
    close(make("owned", "x"));
    printf("chown: %s\n", TRY(chown("owned", 12345, 4000000000u)));
    printf("chmod: %s\n", TRY(chmod("owned", 06751)));
    show("owned", "owned");
    printf("chown clears the bits: %s\n", TRY(chown("owned", 7, 8)));
    show("owned", "owned");
    chmod("owned", 04777);
    pid_t child = fork();
    if (!child) {
        if (setgid(99) || setuid(99)) _exit(1);
        int file = open("owned", O_WRONLY);
        _exit(file < 0 || write(file, "y", 1) != 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    printf("another user's write: %d\n", status);
    show("a write clears the bits", "owned");
    printf("a sticky folder: %s\n", TRY(mkdir("sticky", 0700)));
    chmod("sticky", 03775);
    chown("sticky", 5, 6);
    close(make("sticky/in", ""));
    show("inherits the group", "sticky/in");
    umask(077);
    close(open("masked", O_CREAT | O_WRONLY, 0666));
    umask(022);
    show("umask", "masked");
    child = fork();
    if (!child) {
        if (setgid(99) || setuid(99)) _exit(9);
        int denied = open("masked", O_RDONLY) < 0 && errno == EACCES;
        int unlinked = unlink("sticky/in") < 0 && errno == EPERM;
        denied += 2 * unlinked;
        _exit(denied);
    }
    waitpid(child, &status, 0);
    printf("denied: %d\n", WEXITSTATUS(status));
}

static void times(void) {
    close(make("timed", "x"));
    struct timespec set[2] = {{1111111111, 123456789}, {4444444444, 987654321}};
    printf("times: %s\n", TRY(utimensat(AT_FDCWD, "timed", set, 0)));
    struct stat s;
    stat("timed", &s);
    printf("%lld.%09ld %lld.%09ld\n", (long long)s.st_atim.tv_sec, s.st_atim.tv_nsec, (long long)s.st_mtim.tv_sec,
           s.st_mtim.tv_nsec);
    symlink("timed", "timed-link");
    printf("a link's own times: %s\n", TRY(utimensat(AT_FDCWD, "timed-link", set, AT_SYMLINK_NOFOLLOW)));
    lstat("timed-link", &s);
    printf("%lld\n", (long long)s.st_mtim.tv_sec);
    int file = open("timed", O_WRONLY | O_APPEND);
    write(file, "y", 1);
    close(file);
    stat("timed", &s);
    time_t now = time(0);
    printf("a write is now: %d\n", s.st_mtim.tv_sec > now - 60 && s.st_mtim.tv_sec < now + 60);
}

static void attributes(void) {
    char value[70000];
    close(make("tagged", "x"));
    printf("user attribute: %s\n", TRY(setxattr("tagged", "user.word", "value", 5, 0)));
    long length = getxattr("tagged", "user.word", value, sizeof value);
    printf("%ld %.*s\n", length, (int)(length < 0 ? 0 : length), value);
    printf("create it again: %s\n", TRY(setxattr("tagged", "user.word", "v", 1, XATTR_CREATE)));
    printf("replace another: %s\n", TRY(setxattr("tagged", "user.none", "v", 1, XATTR_REPLACE)));
    printf("trusted attribute: %s\n", TRY(setxattr("tagged", "trusted.word", "t", 1, 0)));
    length = listxattr("tagged", value, sizeof value);
    int found = 0;
    for (char *at = value; at < value + length; at += strlen(at) + 1) found += !strcmp(at, "user.word");
    printf("listed: %d\n", found);
    printf("remove: %s\n", TRY(removexattr("tagged", "user.word")));
    printf("and get: %s\n", TRY(getxattr("tagged", "user.word", value, sizeof value)));
    unsigned char caps[20] = {1, 0, 0, 2, 1};
    printf("capability: %s\n", TRY(setxattr("tagged", "security.capability", caps, sizeof caps, 0)));
    printf("capability is there: %s\n", TRY(getxattr("tagged", "security.capability", value, sizeof value)));
}

#define ACCESS "system.posix_acl_access"
#define DEFAULT "system.posix_acl_default"
enum { OWNER = 1, USER = 2, OWN_GROUP = 4, GROUP = 8, MASK = 16, OTHERS = 32, NOBODYS = -1 };
struct entry { uint16_t tag, perm; uint32_t id; };

/* An access list (acl(5)): `user` and `group` may do what is said, others nothing. */
static int give(const char *name, const char *which, int user, int group, int mask) {
    struct { uint32_t version; struct entry entries[6]; } list = {2, {
        {OWNER, 6, NOBODYS}, {USER, user, 1234}, {OWN_GROUP, 0, NOBODYS}, {GROUP, group, 2345}, {MASK, mask, NOBODYS},
        {OTHERS, 0, NOBODYS}}};
    return setxattr(name, which, &list, sizeof list, 0);
}

static void show_list(const char *what, const char *name, const char *which) {
    struct { uint32_t version; struct entry entries[50]; } list;
    long length = getxattr(name, which, &list, sizeof list);
    printf("%s: %s", what, err(length));
    for (int at = 0; at < (length - 4) / 8; at++)
        printf(" %d:%d:%o", list.entries[at].tag, (int)list.entries[at].id, list.entries[at].perm);
    puts("");
}

/* What somebody may do with a file. */
static void may(const char *name, int user, int group) {
    int status;
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        if (setgroups(0, 0) || setgid(group) || setuid(user)) _exit(9);
        _exit((open(name, O_RDONLY) >= 0) * 4 + (open(name, O_WRONLY) >= 0) * 2);
    }
    waitpid(child, &status, 0);
    printf("%s may %d:%d: %o\n", name, user, group, WEXITSTATUS(status));
}

static void lists(void) {
    close(make("listed", "x"));
    chmod(".", 0755);
    show_list("none yet", "listed", ACCESS);
    printf("access list: %s\n", TRY(give("listed", ACCESS, 6, 4, 6)));
    show_list("it is", "listed", ACCESS);
    show("its mode is the mask", "listed");
    may("listed", 1234, 99), may("listed", 99, 2345), may("listed", 99, 0), may("listed", 99, 99);
    printf("a mode takes from the mask: %s\n", TRY(chmod("listed", 0640)));
    show_list("it is", "listed", ACCESS);
    may("listed", 1234, 99), may("listed", 99, 2345);
    printf("not a list: %s\n", TRY(setxattr("listed", ACCESS, "word", 4, 0)));
    printf("a file has no default: %s\n", TRY(give("listed", DEFAULT, 6, 4, 6)));
    printf("take it away: %s\n", TRY(removexattr("listed", ACCESS)));
    show_list("none", "listed", ACCESS);
    may("listed", 1234, 99);
    mkdir("heirs", 0755);
    printf("default list: %s\n", TRY(give("heirs", DEFAULT, 6, 4, 6)));
    show_list("it is", "heirs", DEFAULT);
    umask(077);
    close(open("heirs/file", O_CREAT | O_WRONLY, 0666));
    mkdir("heirs/folder", 0777);
    mkfifo("heirs/fifo", 0604);
    symlink("x", "heirs/link");
    umask(022);
    show("the umask does not count", "heirs/file");
    show_list("inherited", "heirs/file", ACCESS);
    show_list("by a folder", "heirs/folder", ACCESS);
    show_list("for its own", "heirs/folder", DEFAULT);
    show_list("by a fifo", "heirs/fifo", ACCESS);
    show("a fifo", "heirs/fifo");
    show("a link", "heirs/link");
    printf("folders are as before: %s\n", TRY(removexattr("heirs", DEFAULT)));
    umask(027);
    close(open("heirs/later", O_CREAT | O_WRONLY, 0666));
    umask(022);
    show("the umask counts", "heirs/later");
    pid_t child = fork();
    if (!child) { setuid(99); _exit(give("listed", ACCESS, 6, 4, 6) < 0 ? errno : 0); }
    int status;
    waitpid(child, &status, 0);
    printf("of another's file: %s\n", strerrorname_np(WEXITSTATUS(status)));
}

static int access_list(const char *what, const char *name) {
    if (!strcmp(what, "give")) return give(name, ACCESS, 4, 6, 6);
    show_list(what, name, ACCESS);
    show(what, name);
    may(name, 1234, 99), may(name, 99, 2345), may(name, 99, 99);
    return 0;
}

static void links(void) {
    close(make("first", "one"));
    printf("hard link: %s\n", TRY(link("first", "second")));
    show("first", "first");
    int file = open("second", O_WRONLY | O_APPEND);
    write(file, "+two", 4);
    close(file);
    char text[300] = {0};
    file = open("first", O_RDONLY);
    read(file, text, sizeof text);
    close(file);
    struct stat a, b;
    stat("first", &a), stat("second", &b);
    printf("%s, same %d\n", text, a.st_ino == b.st_ino);
    printf("symlink: %s\n", TRY(symlink("no/where\xff", "dangling")));
    long length = readlink("dangling", text, sizeof text);
    printf("%ld %02x\n", length, length < 0 ? 0 : (unsigned char)text[length - 1]);
    printf("through it: %s\n", TRY(open("dangling", O_RDONLY)));
    symlink("loop", "loop");
    printf("loop: %s\n", TRY(open("loop", O_RDONLY)));
    printf("not followed: %s\n", TRY(open("dangling", O_RDONLY | O_NOFOLLOW)));
    char *name = malloc(300);
    memset(name, 'n', 255), name[255] = 0;
    printf("255 bytes: %s\n", TRY(close(make(name, ""))));
    name[255] = 'n', name[256] = 0;
    printf("256 bytes: %s\n", TRY(open(name, O_CREAT | O_WRONLY, 0600)));
    printf("any bytes: %s\n", TRY(close(make("\xff\x01\xc3\x28 \n", ""))));
    DIR *folder = opendir(".");
    int odd = 0, longest = 0;
    for (struct dirent *one; (one = readdir(folder));) {
        odd += !strcmp(one->d_name, "\xff\x01\xc3\x28 \n");
        if (strlen(one->d_name) > (size_t)longest) longest = strlen(one->d_name);
    }
    closedir(folder);
    printf("listed: %d %d\n", odd, longest);
}

static void renames(void) {
    close(make("from", "new"));
    int old = make("to", "old");
    printf("rename over: %s\n", TRY(rename("from", "to")));
    char text[9] = {0};
    pread(old, text, 8, 0);
    struct stat s;
    fstat(old, &s);
    printf("held: %s, links %lu\n", text, (unsigned long)s.st_nlink);
    close(old);
    show("to", "to");
    close(make("a", "a")), close(make("b", "bb"));
    printf("no replace: %s\n", TRY(renameat2(AT_FDCWD, "a", AT_FDCWD, "b", RENAME_NOREPLACE)));
    printf("exchange: %s\n", TRY(renameat2(AT_FDCWD, "a", AT_FDCWD, "b", RENAME_EXCHANGE)));
    show("a", "a");
    mkdir("full", 0755), close(make("full/x", ""));
    mkdir("empty", 0755);
    printf("over a full folder: %s\n", TRY(rename("empty", "full")));
    printf("over an empty one: %s\n", TRY(rename("full", "empty")));
    printf("into itself: %s\n", TRY(rename("empty", "empty/x/y")));
    printf("rmdir: %s\n", TRY(rmdir("empty")));
    int gone = make("gone", "still");
    unlink("gone");
    printf("unlinked: %zd\n", pread(gone, text, 5, 0));
    printf("and truncated: %s\n", TRY(ftruncate(gone, 1)));
    close(gone);
    int nameless = open(".", O_TMPFILE | O_RDWR, 0600);
    printf("nameless: %s\n", err(nameless));
    if (nameless >= 0) close(nameless);
}

static void large(void) {
    int file = make("large", "");
    off_t far = 5LL << 30;
    printf("5 GiB: %zd\n", pwrite(file, "end", 3, far));
    struct stat s;
    fstat(file, &s);
    printf("size %lld, sparse %d\n", (long long)s.st_size, s.st_blocks < 1000);
    char text[4] = {1, 1, 1, 0};
    pread(file, text, 3, 4LL << 30);
    printf("a hole: %d\n", text[0] | text[1] | text[2]);
    pread(file, text, 3, far);
    printf("the end: %s\n", text);
    off_t data = lseek(file, 0, SEEK_DATA), hole = lseek(file, 0, SEEK_HOLE);
    printf("seek: %d %lld\n", data > (4LL << 30), (long long)hole);
    printf("allocate: %s\n", TRY(fallocate(file, 0, 0, 1 << 20)));
    printf("punch: %s\n", TRY(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1 << 20)));
    printf("truncate: %s\n", TRY(ftruncate(file, 6LL << 30)));
    show("large", "large");
    int copy = make("copy", "");
    off_t from = far;
    printf("copy range: %zd\n", copy_file_range(file, &from, copy, 0, 3, 0));
    printf("inode is not cut: %d\n", sizeof s.st_ino == 8);
    close(file), close(copy), unlink("large");
}

static void memory(void) {
    enum { SIZE = 1 << 20 };
    int file = make("mapped", "");
    ftruncate(file, SIZE);
    char *one = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    char *two = mmap(0, SIZE, PROT_READ, MAP_SHARED, file, 0);
    printf("maps: %d\n", one != MAP_FAILED && two != MAP_FAILED);
    memset(one + 5000, 'm', 5000);
    printf("seen in the other: %c\n", two[9999]);
    printf("msync: %s\n", TRY(msync(one, SIZE, MS_SYNC)));
    char byte = 0;
    pread(file, &byte, 1, 7000);
    printf("read: %c\n", byte);
    pwrite(file, "w", 1, 0);
    printf("written: %c\n", two[0]);
    pid_t child = fork();
    if (!child) { one[1] = 'c'; _exit(0); }
    waitpid(child, 0, 0);
    printf("a child's: %c\n", two[1]);
    void *block;
    posix_memalign(&block, 4096, 8192);
    memset(block, 'd', 8192);
    int direct = open("direct", O_RDWR | O_CREAT | O_DIRECT, 0644);
    printf("direct: %s\n", err(direct));
    if (direct >= 0) {
        printf("write %zd\n", pwrite(direct, block, 8192, 4096));
        printf("read %zd\n", pread(direct, block, 4096, 8192));
        close(direct);
    }
    struct iovec parts[2] = {{"ab", 2}, {"cd", 2}};
    printf("vectors: %zd\n", pwritev(file, parts, 2, 100));
    int append = open("mapped", O_WRONLY | O_APPEND);
    write(append, "z", 1);
    struct stat s;
    fstat(append, &s);
    printf("append: %lld\n", (long long)s.st_size);
    printf("fsync: %s, fdatasync: %s\n", TRY(fsync(file)), TRY(fdatasync(file)));
    int folder = open(".", O_RDONLY);
    printf("a folder's fsync: %s\n", TRY(fsync(folder)));
    printf("syncfs: %s\n", TRY(syncfs(folder)));
}

enum { SIZE = 8192 };
static void show_parts(int file) {
    char text[SIZE + 16] = {0};
    long length = pread(file, text, sizeof text - 1, 0);
    printf("size %ld: %c %s %s\n", length, text[0], text + 4096, text + SIZE);
}

/* What is written through the shared map of a file that is open to append belongs where it is mapped, and what is
 * written by write(2) to its end. */
static void append_map(const char *name) {
    int file = open(name, O_RDWR | O_CREAT | O_TRUNC | O_APPEND, 0644);
    printf("sized: %s\n", TRY(ftruncate(file, SIZE)));
    char *map = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    printf("map of an appending file: %s\n", map == MAP_FAILED ? err(-1) : "ok");
    if (map == MAP_FAILED) return;
    memset(map, 'a', SIZE);
    printf("msync: %s\n", TRY(msync(map, SIZE, MS_SYNC)));
    show("is as large as before", name);
    printf("appended: %zd\n", write(file, "end", 3));
    strcpy(map + 4096, "again");
    /* one more that appends, opened last and never mapped */
    int other = open(name, O_RDWR | O_APPEND);
    printf("appended by another: %zd\n", write(other, "+", 1));
    munmap(map, SIZE), close(file);
    file = open(name, O_RDWR | O_APPEND);
    show_parts(file);
    /* mapped to be read, made writable later; a child goes on with it when the file is closed */
    map = mmap(0, SIZE, PROT_READ, MAP_SHARED, file, 4096);
    printf("made writable: %s\n", TRY(mprotect(map, SIZE, PROT_READ | PROT_WRITE)));
    close(file), close(other);
    pid_t child = fork();
    if (!child) { strcpy(map, "child"); _exit(0); }
    waitpid(child, 0, 0);
    munmap(map, SIZE);
    file = open(name, O_RDONLY);
    show_parts(file);
    close(file);
}

static void append_held(const char *name) {
    char text[4097] = {0};
    /* of one who could not open it again */
    int file = open(name, O_RDWR | O_CREAT | O_TRUNC | O_APPEND, 0644);
    ftruncate(file, 4096), chmod(name, 0);
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        if (setgid(99) || setuid(99)) _exit(9);
        char *map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (map == MAP_FAILED) _exit(errno);
        strcpy(map, "held");
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    long length = pread(file, text, 4096, 0);
    printf("not mine: %d, size %ld: %s\n", status, length, text);
    close(file);
    /* without a name */
    file = open(name, O_RDWR | O_APPEND);
    unlink(name);
    char *map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    printf("map without a name: %s\n", map == MAP_FAILED ? err(-1) : "ok");
    if (map != MAP_FAILED) {
        strcpy(map, "nameless");
        msync(map, 4096, MS_SYNC);
        munmap(map, 4096);
    }
    length = pread(file, text, 4096, 0);
    printf("after it size %ld: %s\n", length, text);
    close(file);
}

/* Appends each line that comes to a file that stays open. */
static int words(const char *name) {
    char line[100];
    int file = open(name, O_RDWR | O_CREAT | O_APPEND, 0644);
    setlinebuf(stdout);
    while (fgets(line, sizeof line, stdin))
        printf("%s\n", write(file, line, strlen(line)) == (ssize_t)strlen(line) ? "written" : err(-1));
    return 0;
}

static void others(void) {
    printf("fifo: %s\n", TRY(mkfifo("fifo", 0640)));
    show("fifo", "fifo");
    printf("exclusive: %s\n", TRY(open("fifo", O_CREAT | O_EXCL | O_WRONLY, 0600)));
    printf("a folder as a file: %s\n", TRY(open(".", O_WRONLY)));
    printf("missing: %s\n", TRY(open("none/x", O_RDONLY)));
    struct statvfs fs;
    printf("statvfs: %s\n", TRY(statvfs(".", &fs)));
    printf("names of %lu bytes\n", fs.f_namemax);
    for (int number = 0; number < 1500; number++) {
        char name[40];
        snprintf(name, sizeof name, "many/%d", number);
        if (!number) mkdir("many", 0755);
        close(open(name, O_CREAT | O_WRONLY, 0644));
    }
    DIR *folder = opendir("many");
    int count = 0;
    for (struct dirent *one; (one = readdir(folder));) {
        if (one->d_name[0] == '.') continue;
        char name[300];
        snprintf(name, sizeof name, "many/%s", one->d_name);
        count += unlink(name) == 0;
    }
    closedir(folder);
    printf("listed and removed: %d, %s\n", count, TRY(rmdir("many")));
}

static int take(const char *kind, int file, int wait) {
    struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (!strcmp(kind, "flock")) return flock(file, LOCK_EX | (wait ? 0 : LOCK_NB));
    if (!strcmp(kind, "fcntl")) return fcntl(file, wait ? F_SETLKW : F_SETLK, &all);
    return fcntl(file, wait ? F_OFD_SETLKW : F_OFD_SETLK, &all);
}

static int locks(const char *what, const char *kind, const char *name) {
    int file = open(name, O_RDWR | O_CREAT, 0644);
    setlinebuf(stdout);
    if (!strcmp(kind, "map")) {
        ftruncate(file, 4096);
        char *map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (!strcmp(what, "hold")) { strcpy(map, "from one"); puts("held"); pause(); }
        printf("%s: %s\n", what, map);
        return 0;
    }
    if (!strcmp(what, "hold")) { if (take(kind, file, 0)) return 1; puts("held"); pause(); }
    int taken = take(kind, file, !strcmp(what, "wait"));
    printf("%s %s: %s\n", what, kind, taken < 0 ? "busy" : "got it");
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 4) return locks(argv[1], argv[2], argv[3]);
    if (argc == 3 && !strcmp(argv[1], "append")) return append_map(argv[2]), append_held("held"), 0;
    if (argc == 3 && !strcmp(argv[1], "words")) return words(argv[2]);
    if (argc == 3) return access_list(argv[1], argv[2]);
    if (argc != 2 || chdir(argv[1])) return 1;
    umask(022);
    owners(), times(), attributes(), lists(), links(), renames(), large(), memory(), others();
    append_map("appended"), append_held("held");
    return 0;
}
