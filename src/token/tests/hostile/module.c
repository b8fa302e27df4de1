/* A PKCS#11 module that forwards to SoftHSM and misbehaves as told.
 *
 * HOSTILE_DIR is a folder it may write to. Lines of the file `control` in it are rules, read at each
 * call, so that a test can change them while the host runs:
 *
 *     FUNCTION ACTION [ARGUMENT [TIMES]]
 *
 *     fail CODE     return CODE without forwarding
 *     lost CODE     the same until the next C_Initialize
 *     refuse CODE   forward, then return CODE
 *     hang          never return
 *     abort, crash, exit
 *     print         write a line to stdout, then forward
 *     lie N         forward, then claim N bytes (or objects, or slots)
 *     flags MASK    C_GetTokenInfo: set these flags
 *     own-iv        C_EncryptInit: write over the caller's IV
 *     append-iv     C_Encrypt: 16 bytes after the tag
 *     same          C_GenerateRandom: the same bytes each time
 *
 * Each call is noted in the file `trace`. The rule `load spy` makes the module look around when it
 * is loaded and write what it found into `report`; `load fork` leaves a child behind that keeps
 * every descriptor. C_GetInterface is exported and broken.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

typedef unsigned long ulong_t;
/* No function that is wrapped has more than six arguments, each a pointer or a number. */
typedef ulong_t (*call_t)(ulong_t, ulong_t, ulong_t, ulong_t, ulong_t, ulong_t);

#define FUNCTIONS 68
struct list {
    unsigned char major, minor;
    call_t at[FUNCTIONS];
};

static struct list ours;
static struct list *real;
/* Calls of C_Initialize: in all, and when the rules were last changed. */
static int starts, starts_then;

struct rule {
    char action[16];
    ulong_t argument;
};

static void path_of(const char *name, char out[512]) {
    const char *folder = getenv("HOSTILE_DIR");
    snprintf(out, 512, "%s/%s", folder ? folder : "/nonexistent", name);
}

static void note(const char *file, const char *format, ...) {
    char path[512], line[512];
    path_of(file, path);
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd >= 0) {
        if (write(fd, line, n) < 0) { /* nothing to be done */ }
        close(fd);
    }
}

/* The rule for this function, if there is one with tries left. */
static int rule_for(const char *function, struct rule *rule) {
    static char seen[2048];
    static int used[64];
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    char path[512], text[2048] = "";
    path_of("control", path);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) return 0;
    pthread_mutex_lock(&lock);
    if (strcmp(text, seen) != 0) {
        strcpy(seen, text);
        starts_then = starts;
        memset(used, 0, sizeof used);
    }
    int at = 0, found = 0;
    char *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line && at < 64 && !found;
         line = strtok_r(NULL, "\n", &rest), at++) {
        char name[64] = "", argument[32] = "0";
        int times = -1;
        if (sscanf(line, "%63s %15s %31s %d", name, rule->action, argument, &times) < 2) continue;
        if (strcmp(name, function) != 0) continue;
        if (times >= 0 && used[at]++ >= times) continue;
        rule->argument = strtoul(argument, NULL, 0);
        found = 1;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static ulong_t run(int index, const char *name, ulong_t a, ulong_t b, ulong_t c, ulong_t d,
                   ulong_t e, ulong_t f) {
    struct rule rule;
    note("trace", "%s\n", name);
    if (index == 0) __sync_fetch_and_add(&starts, 1);
    if (!rule_for(name, &rule)) return real->at[index](a, b, c, d, e, f);
    if (!strcmp(rule.action, "fail")) return rule.argument;
    if (!strcmp(rule.action, "lost") && starts == starts_then) return rule.argument;
    if (!strcmp(rule.action, "hang")) for (;;) pause();
    if (!strcmp(rule.action, "abort")) abort();
    if (!strcmp(rule.action, "crash")) *(volatile int *)8 = 1;
    if (!strcmp(rule.action, "exit")) exit((int)rule.argument);
    if (!strcmp(rule.action, "print")) {
        printf("the module says hello from %s\n", name);
        fflush(stdout);
    }
    if (!strcmp(rule.action, "own-iv")) {
        struct { ulong_t mechanism; struct { unsigned char *iv; } *parameter; } *mechanism = (void *)b;
        if (mechanism->mechanism == 0x1087) memset(mechanism->parameter->iv, 0x5a, 12);
    }
    ulong_t code = real->at[index](a, b, c, d, e, f);
    if (!strcmp(rule.action, "refuse")) return rule.argument;
    if (!strcmp(rule.action, "flags")) *(ulong_t *)(b + 96) |= rule.argument;
    if (!strcmp(rule.action, "append-iv") && code == 0) *(ulong_t *)e += 16;
    if (!strcmp(rule.action, "same")) memset((void *)b, 0x11, c);
    if (!strcmp(rule.action, "lie") && code == 0) {
        if (!strcmp(name, "C_GetSlotList")) *(ulong_t *)c = rule.argument;
        else if (!strcmp(name, "C_FindObjects")) *(ulong_t *)d = rule.argument;
        else if (!strcmp(name, "C_GetAttributeValue")) ((ulong_t *)c)[2] = rule.argument;
        else *(ulong_t *)e = rule.argument;
    }
    return code;
}

#define WRAPPED(X) \
    X(0, C_Initialize) X(1, C_Finalize) X(4, C_GetSlotList) X(6, C_GetTokenInfo) \
    X(12, C_OpenSession) X(13, C_CloseSession) X(15, C_GetSessionInfo) X(18, C_Login) \
    X(24, C_GetAttributeValue) X(26, C_FindObjectsInit) X(27, C_FindObjects) \
    X(28, C_FindObjectsFinal) X(29, C_EncryptInit) X(30, C_Encrypt) X(33, C_DecryptInit) \
    X(34, C_Decrypt) X(42, C_SignInit) X(43, C_Sign) X(64, C_GenerateRandom)

#define WRAPPER(INDEX, NAME) \
    static ulong_t wrapped_##NAME(ulong_t a, ulong_t b, ulong_t c, ulong_t d, ulong_t e, ulong_t f) { \
        return run(INDEX, #NAME, a, b, c, d, e, f); \
    }
WRAPPED(WRAPPER)

ulong_t C_GetFunctionList(struct list **out) {
    const char *path = getenv("HOSTILE_FORWARD");
    void *library = dlopen(path ? path : "/usr/lib/softhsm/libsofthsm2.so", RTLD_NOW | RTLD_LOCAL);
    if (!library) return 5;
    ulong_t (*get)(struct list **) = (ulong_t (*)(struct list **))dlsym(library, "C_GetFunctionList");
    if (!get || get(&real) != 0) return 5;
    ours = *real;
#define SET(INDEX, NAME) ours.at[INDEX] = wrapped_##NAME;
    WRAPPED(SET)
    *out = &ours;
    return 0;
}

ulong_t C_GetInterface(void *name, void *version, void **interface, ulong_t flags) {
    (void)name; (void)version; (void)flags;
    *interface = (void *)16;
    return 5;
}

static void tried(const char *what, long result) {
    note("report", "%s=%s\n", what, result < 0 ? strerrorname_np(errno) : "ok");
}

static void list(const char *what, const char *path) {
    DIR *folder = opendir(path);
    if (!folder) {
        tried(what, -1);
        return;
    }
    note("report", "%s=", what);
    for (struct dirent *entry; (entry = readdir(folder));)
        if (entry->d_name[0] != '.') note("report", "%s ", entry->d_name);
    note("report", "\n");
    closedir(folder);
}

static void open_each(const char *how) {
    char names[2048];
    snprintf(names, sizeof names, "%s", getenv("SPY_FILES") ? getenv("SPY_FILES") : "");
    char *rest = NULL;
    for (char *name = strtok_r(names, ":", &rest); name; name = strtok_r(NULL, ":", &rest)) {
        int fd = open(name, O_RDONLY | O_CLOEXEC);
        note("report", "%s %s=%s\n", how, name, fd < 0 ? strerrorname_np(errno) : "ok");
    }
}

/* Root in a user namespace of its own may mount and unmount: what does that uncover? */
static void become_root_in_own_namespace(void) {
    pid_t child = fork();
    if (child != 0) {
        waitpid(child, NULL, 0);
        return;
    }
    long made = unshare(CLONE_NEWUSER | CLONE_NEWNS);
    tried("own namespace", made);
    if (made == 0) {
        tried("inside it unmount mask", umount2("/etc/hsm", MNT_DETACH));
        tried("inside it unmount /proc", umount2("/proc", MNT_DETACH));
        tried("inside it unmount /", umount2("/", MNT_DETACH));
        tried("inside it remount /usr",
              mount(NULL, "/usr", NULL, MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV, NULL));
        /* The old way out of a changed root. */
        if (mkdir("/tmp/out", 0700) == 0 && chroot("/tmp/out") == 0)
            for (int i = 0; i < 32; i++)
                if (chdir("..") != 0) break;
        if (chroot(".") == 0) list("inside it root", ".");
    }
    open_each("inside it open");
    _exit(0);
}

/* Everything a module may want to do to its host, each with what came of it. */
static void spy(void) {
    char path[512];
    list("descriptors", "/proc/self/fd");
    long daemon = atol(getenv("SPY_DAEMON") ? getenv("SPY_DAEMON") : "0");
    snprintf(path, sizeof path, "/proc/%ld/environ", daemon);
    tried("read daemon environ", open(path, O_RDONLY | O_CLOEXEC));
    snprintf(path, sizeof path, "/proc/%ld/root/etc/passwd", daemon);
    tried("read through daemon root", open(path, O_RDONLY | O_CLOEXEC));
    tried("signal daemon", kill((pid_t)daemon, 0));
    tried("trace daemon", ptrace(PTRACE_ATTACH, (pid_t)daemon, 0, 0));
    note("report", "parent=%d\n", getppid());
    note("report", "pid=%d\n", getpid());
    tried("trace parent", ptrace(PTRACE_ATTACH, getppid(), 0, 0));

    open_each("open");
    const char *socket_path = getenv("SPY_SOCKET");
    if (socket_path) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        snprintf(address.sun_path, sizeof address.sun_path, "%s", socket_path);
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        tried("connect", connect(fd, (struct sockaddr *)&address, sizeof address));
    }
    tried("setuid 0", setuid(0));
    tried("setgid 0", setgid(0));
    tried("mount", mount("tmpfs", "/tmp", "tmpfs", 0, NULL));
    tried("remount root", mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL));
    tried("unmount mask", umount2("/etc/hsm", MNT_DETACH));
    tried("mknod", mknod("/tmp/disk", S_IFBLK | 0600, 0x800));
    tried("chroot", chroot("/tmp"));
    tried("write /", open("/x", O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    tried("write /etc", open("/etc/x", O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    tried("write /dev", open("/dev/x", O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    tried("write /tmp", open("/tmp/x", O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    tried("write /dev/null", open("/dev/null", O_WRONLY | O_CLOEXEC));
    tried("read /dev/urandom", open("/dev/urandom", O_RDONLY | O_CLOEXEC));
    snprintf(path, sizeof path, "%s", getenv("SPY_WRITE") ? getenv("SPY_WRITE") : "/");
    tried("write named file", open(path, O_WRONLY | O_CLOEXEC));
    list("sys", "/sys");
    list("host root", "/.host");
    list("root", "/");
    list("proc", "/proc");
    list("dev", "/dev");
    struct rlimit core;
    getrlimit(RLIMIT_CORE, &core);
    note("report", "core=%lu\n", (ulong_t)core.rlim_max);
    FILE *status = fopen("/proc/self/status", "re");
    char line[256];
    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, "Cap", 3) || !strncmp(line, "NoNewPrivs", 10) || !strncmp(line, "Uid", 3)
            || !strncmp(line, "Gid", 3) || !strncmp(line, "Groups", 6))
            note("report", "%s", line);
    if (status) fclose(status);
    become_root_in_own_namespace();
    note("report", "end=ok\n");
}

__attribute__((constructor)) static void loaded(void) {
    struct rule rule;
    while (rule_for("load", &rule)) {
        if (!strcmp(rule.action, "spy")) spy();
        if (!strcmp(rule.action, "exit")) exit((int)rule.argument);
        if (!strcmp(rule.action, "hang")) for (;;) pause();
        if (!strcmp(rule.action, "fork")) {
            pid_t child = fork();
            if (child == 0) {
                if (fork() != 0) _exit(0);
                setsid();
                for (;;) pause();
            }
            waitpid(child, NULL, 0);
        }
        return;
    }
}
