// Faults in the system calls that change files, for tests: LD_PRELOAD this library into a process, then arm it.
//
// An operation counts when its path lies under the root that faults_arm names. The fault happens at the nth operation.
// The state is in shared memory, so a process that forked sees how far its killed child came.
//
// The libc functions are interposed. A rename that Rust makes without libc (safetensors, through rustix) is caught by a
// seccomp filter that turns it into a SIGSYS here. Not seen are fopen, fallocate, io_uring, and writes through mmap.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
#define REGISTER(context, name_x86, number_arm) ((context)->uc_mcontext.gregs[name_x86])
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#define REGISTER(context, name_x86, number_arm) ((context)->uc_mcontext.regs[number_arm])
#else
#error "tests/faults knows x86_64 and aarch64"
#endif

enum action { COUNT, KILL_BEFORE, KILL_DURING, NO_SPACE, NO_SPACE_ONCE };  // as in tests/faults/__init__.py
enum plan { GO, GO_AND_DIE, FAIL, REFUSE };
enum { TRACE_BYTES = 1 << 20 };

static struct state {
  atomic_bool armed;
  atomic_long count;
  atomic_bool shortened;  // The full disk has taken its last half write.
  long nth;
  enum action action;
  char refused[256];  // Kinds of operations that the file system does not have, each with a space on both sides.
  int refusal;        // Their errno.
  char root[PATH_MAX], real_root[PATH_MAX];  // As given, and without symbolic links: /proc/self/fd shows the latter.
  atomic_size_t trace_length;
  char trace[TRACE_BYTES];
} *state;

#define REAL(name)                                                        \
  ({                                                                      \
    static _Atomic(__typeof__(&name)) real;                               \
    if (real == NULL) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name);  \
    real;                                                                 \
  })

static _Noreturn void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// ---- Paths ----

// Removes "//", "." and ".." from an absolute path, in place and by the text alone.
static void normalise(char *path) {
  char *out = path;
  for (char *part = path; *part != '\0';) {
    while (*part == '/') part++;
    size_t length = strcspn(part, "/");
    if (length == 2 && memcmp(part, "..", 2) == 0) {
      while (out > path && *--out != '/') {}
    } else if (length > 0 && !(length == 1 && *part == '.')) {
      // Forwards only: the text before `part` has at least as many slashes as the part that was kept.
      *out++ = '/';
      memmove(out, part, length);
      out += length;
    }
    part += length;
  }
  *out = '\0';
}

static bool descriptor_path(int descriptor, char out[PATH_MAX]) {
  char link[32];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, out, PATH_MAX - 1);
  if (length <= 0 || out[0] != '/') return false;
  out[length] = '\0';
  return true;
}

static bool absolute(int folder, const char *path, char out[PATH_MAX]) {
  if (path == NULL) return false;
  size_t base = 0;
  if (path[0] != '/') {
    if (folder == AT_FDCWD ? getcwd(out, PATH_MAX) == NULL : !descriptor_path(folder, out)) return false;
    base = strlen(out);
    if (base + 1 >= PATH_MAX) return false;
    out[base++] = '/';
  }
  if (base + strlen(path) >= PATH_MAX) return false;
  strcpy(out + base, path);
  normalise(out);
  return true;
}

// Returns the path relative to the root, "." for the root itself, NULL for a path elsewhere.
static const char *below(const char *path, const char *root) {
  size_t length = strlen(root);
  if (strncmp(path, root, length) != 0) return NULL;
  if (path[length] == '\0') return ".";
  return path[length] == '/' ? path + length + 1 : NULL;
}

static const char *below_root(const char *path) {
  const char *given = below(path, state->root);
  return given != NULL ? given : below(path, state->real_root);
}

// ---- What happens to an operation ----

// Lock-free, since a kill may come in the middle: a line is reserved first and filled then.
static void trace(const char *line, size_t length) {
  size_t at = atomic_fetch_add(&state->trace_length, length + 1);
  if (at + length + 1 > TRACE_BYTES) return;
  memcpy(state->trace + at, line, length);
  state->trace[at + length] = '\n';
}

static void describe(long number, const char *kind, const char *path, const char *to, const size_t *size) {
  char line[2 * PATH_MAX + 64];
  int length = snprintf(line, sizeof line, "%ld %s %s", number, kind, path);
  if (to != NULL) length += snprintf(line + length, sizeof line - length, " -> %s", to);
  if (size != NULL) length += snprintf(line + length, sizeof line - length, " (%zu bytes)", *size);
  trace(line, length);
}

// `size`: of an operation that moves bytes; halved here for a short one.
static enum plan decide(long number, bool needs_space, size_t *size) {
  bool reached = state->nth > 0 && number >= state->nth;
  if (!reached || state->action == COUNT) return GO;
  switch (state->action) {
    case KILL_BEFORE:
    case KILL_DURING:
      // A later operation is another thread's: the nth is to be the last.
      if (number > state->nth)
        for (;;) pause();
      if (state->action == KILL_BEFORE) die();
      if (size != NULL) *size /= 2;
      return GO_AND_DIE;
    case NO_SPACE:
      if (!needs_space) return GO;
      if (size != NULL && *size > 1 && !atomic_exchange(&state->shortened, true)) {
        *size /= 2;
        return GO;
      }
      return FAIL;
    default:
      return needs_space && number == state->nth ? FAIL : GO;
  }
}

// An fsync of a folder is a kind of its own here: some file systems have only that of a file.
static bool refuses(const char *kind, const char *path) {
  char name[32];
  struct stat64 status;
  bool folder = strcmp(kind, "fsync") == 0 && stat64(path, &status) == 0 && S_ISDIR(status.st_mode);
  snprintf(name, sizeof name, " %s%s ", kind, folder ? "-folder" : "");
  return strstr(state->refused, name) != NULL;
}

// Absolute paths; `to` is NULL for an operation on one path.
static enum plan plan(const char *kind, const char *path, const char *to, bool needs_space, size_t *size) {
  const char *inside = below_root(path), *inside_to = to != NULL ? below_root(to) : NULL;
  if (inside == NULL && inside_to == NULL) return GO;
  int saved = errno;
  long number = atomic_fetch_add(&state->count, 1) + 1;
  describe(number, kind, inside != NULL ? inside : path, to != NULL && inside_to != NULL ? inside_to : to, size);
  bool refused = refuses(kind, path);
  errno = saved;
  return refused ? REFUSE : decide(number, needs_space, size);
}

static bool armed(void) { return state != NULL && atomic_load(&state->armed); }

static enum plan plan_path(const char *kind, int folder, const char *path, bool needs_space) {
  char full[PATH_MAX];
  int saved = errno;
  if (!armed() || !absolute(folder, path, full)) return errno = saved, GO;
  return plan(kind, full, NULL, needs_space, NULL);
}

static enum plan plan_two(const char *kind, int folder, const char *path, int to_folder, const char *to) {
  char full[PATH_MAX], full_to[PATH_MAX];
  int saved = errno;
  if (!armed() || !absolute(folder, path, full) || !absolute(to_folder, to, full_to)) return errno = saved, GO;
  return plan(kind, full, full_to, below_root(full_to) != NULL, NULL);
}

static enum plan plan_descriptor(const char *kind, int descriptor, bool needs_space, size_t *size) {
  char full[PATH_MAX];
  int saved = errno;
  // Moving no bytes changes nothing: sendfile at the end of its input.
  if (!armed() || (size != NULL && *size == 0) || !descriptor_path(descriptor, full)) return errno = saved, GO;
  return plan(kind, full, NULL, needs_space, size);
}

// `call` is evaluated after the plan, which may have shortened its size.
#define PERFORM(planned, call)                               \
  do {                                                       \
    enum plan chosen = (planned);                            \
    if (chosen == FAIL) return errno = ENOSPC, -1;           \
    if (chosen == REFUSE) return errno = state->refusal, -1; \
    __auto_type result = (call);                             \
    if (chosen == GO_AND_DIE) die();                         \
    return result;                                           \
  } while (0)

// ---- Bytes ----

ssize_t write(int descriptor, const void *data, size_t size) {
  PERFORM(plan_descriptor("write", descriptor, true, &size), REAL(write)(descriptor, data, size));
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
  PERFORM(plan_descriptor("write", descriptor, true, &size), REAL(pwrite)(descriptor, data, size, offset));
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
  PERFORM(plan_descriptor("write", descriptor, true, &size), REAL(pwrite64)(descriptor, data, size, offset));
}

static ssize_t write_vectors(int descriptor, const struct iovec *vectors, int count, size_t size) {
  struct iovec kept[IOV_MAX];
  int used = 0;
  for (; used < count && used < IOV_MAX && size > 0; used++) {
    kept[used] = vectors[used];
    if (kept[used].iov_len > size) kept[used].iov_len = size;
    size -= kept[used].iov_len;
  }
  return REAL(writev)(descriptor, kept, used);
}

ssize_t writev(int descriptor, const struct iovec *vectors, int count) {
  if (!armed()) return REAL(writev)(descriptor, vectors, count);
  size_t size = 0;
  for (int i = 0; i < count; i++) size += vectors[i].iov_len;
  PERFORM(plan_descriptor("write", descriptor, true, &size), write_vectors(descriptor, vectors, count, size));
}

// The most that a copy can move: callers ask for far more than the input has left.
static size_t available(int input, const off64_t *offset, size_t size) {
  struct stat64 status;
  off64_t at = offset != NULL ? *offset : lseek64(input, 0, SEEK_CUR);
  if (!armed() || fstat64(input, &status) != 0 || !S_ISREG(status.st_mode) || at < 0) return size;
  size_t left = at < status.st_size ? (size_t)(status.st_size - at) : 0;
  return size < left ? size : left;
}

ssize_t sendfile(int output, int input, off_t *offset, size_t size) {
  size = available(input, offset, size);
  PERFORM(plan_descriptor("write", output, true, &size), REAL(sendfile)(output, input, offset, size));
}

ssize_t sendfile64(int output, int input, off64_t *offset, size_t size) {
  size = available(input, offset, size);
  PERFORM(plan_descriptor("write", output, true, &size), REAL(sendfile64)(output, input, offset, size));
}

ssize_t copy_file_range(int input, off64_t *from, int output, off64_t *to, size_t size, unsigned flags) {
  size = available(input, from, size);
  PERFORM(plan_descriptor("write", output, true, &size), REAL(copy_file_range)(input, from, output, to, size, flags));
}

int fsync(int descriptor) { PERFORM(plan_descriptor("fsync", descriptor, true, NULL), REAL(fsync)(descriptor)); }

int fdatasync(int descriptor) {
  PERFORM(plan_descriptor("fsync", descriptor, true, NULL), REAL(fdatasync)(descriptor));
}

// Not counted: a lock changes no file.
int flock(int descriptor, int operation) {
  char full[PATH_MAX];
  bool inside = armed() && descriptor_path(descriptor, full) && below_root(full) != NULL;
  if (inside && refuses("lock", full)) return errno = state->refusal, -1;
  return REAL(flock)(descriptor, operation);
}

static bool grows(int descriptor, off64_t length) {
  struct stat64 status;
  return armed() && fstat64(descriptor, &status) == 0 && length > status.st_size;
}

int ftruncate(int descriptor, off_t length) {
  bool growing = grows(descriptor, length);
  PERFORM(plan_descriptor("truncate", descriptor, growing, NULL), REAL(ftruncate)(descriptor, length));
}

int ftruncate64(int descriptor, off64_t length) {
  bool growing = grows(descriptor, length);
  PERFORM(plan_descriptor("truncate", descriptor, growing, NULL), REAL(ftruncate64)(descriptor, length));
}

// ---- Files opened for writing ----

static bool creates(int flags) { return (flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE; }

static enum plan plan_open(int folder, const char *path, int flags) {
  if (creates(flags)) return plan_path("create", folder, path, true);
  return (flags & O_TRUNC) != 0 ? plan_path("truncate", folder, path, false) : GO;
}

#define MODE(flags)                               \
  ({                                              \
    mode_t mode = 0;                              \
    if (creates(flags)) {                         \
      va_list list;                               \
      va_start(list, flags);                      \
      mode = va_arg(list, mode_t);                \
      va_end(list);                               \
    }                                             \
    mode;                                         \
  })

int open(const char *path, int flags, ...) {
  mode_t mode = MODE(flags);
  PERFORM(plan_open(AT_FDCWD, path, flags), REAL(open)(path, flags, mode));
}

int open64(const char *path, int flags, ...) {
  mode_t mode = MODE(flags);
  PERFORM(plan_open(AT_FDCWD, path, flags), REAL(open64)(path, flags, mode));
}

int openat(int folder, const char *path, int flags, ...) {
  mode_t mode = MODE(flags);
  PERFORM(plan_open(folder, path, flags), REAL(openat)(folder, path, flags, mode));
}

int openat64(int folder, const char *path, int flags, ...) {
  mode_t mode = MODE(flags);
  PERFORM(plan_open(folder, path, flags), REAL(openat64)(folder, path, flags, mode));
}

int creat(const char *path, mode_t mode) {
  PERFORM(plan_path("create", AT_FDCWD, path, true), REAL(creat)(path, mode));
}

int creat64(const char *path, mode_t mode) {
  PERFORM(plan_path("create", AT_FDCWD, path, true), REAL(creat64)(path, mode));
}

// ---- Names ----

// Marks our own renames for the filter: the kernel does not look at a sixth argument of renameat2.
#define PASSWORD 0x6c6f7772u

static int rename_any(int folder, const char *path, int to_folder, const char *to, unsigned flags) {
  const char *kind = (flags & RENAME_EXCHANGE) != 0 ? "exchange" : "rename";
  PERFORM(plan_two(kind, folder, path, to_folder, to),
          (int)syscall(SYS_renameat2, folder, path, to_folder, to, flags, PASSWORD));
}

int rename(const char *path, const char *to) { return rename_any(AT_FDCWD, path, AT_FDCWD, to, 0); }

int renameat(int folder, const char *path, int to_folder, const char *to) {
  return rename_any(folder, path, to_folder, to, 0);
}

int renameat2(int folder, const char *path, int to_folder, const char *to, unsigned flags) {
  return rename_any(folder, path, to_folder, to, flags);
}

int link(const char *path, const char *to) {
  PERFORM(plan_two("link", AT_FDCWD, path, AT_FDCWD, to), REAL(link)(path, to));
}

int linkat(int folder, const char *path, int to_folder, const char *to, int flags) {
  PERFORM(plan_two("link", folder, path, to_folder, to), REAL(linkat)(folder, path, to_folder, to, flags));
}

int symlink(const char *content, const char *path) {
  PERFORM(plan_path("symlink", AT_FDCWD, path, true), REAL(symlink)(content, path));
}

int symlinkat(const char *content, int folder, const char *path) {
  PERFORM(plan_path("symlink", folder, path, true), REAL(symlinkat)(content, folder, path));
}

int mkdir(const char *path, mode_t mode) {
  PERFORM(plan_path("mkdir", AT_FDCWD, path, true), REAL(mkdir)(path, mode));
}

int mkdirat(int folder, const char *path, mode_t mode) {
  PERFORM(plan_path("mkdir", folder, path, true), REAL(mkdirat)(folder, path, mode));
}

int unlink(const char *path) { PERFORM(plan_path("unlink", AT_FDCWD, path, false), REAL(unlink)(path)); }

int rmdir(const char *path) { PERFORM(plan_path("rmdir", AT_FDCWD, path, false), REAL(rmdir)(path)); }

int unlinkat(int folder, const char *path, int flags) {
  const char *kind = (flags & AT_REMOVEDIR) != 0 ? "rmdir" : "unlink";
  PERFORM(plan_path(kind, folder, path, false), REAL(unlinkat)(folder, path, flags));
}

// ---- Renames that do not go through libc ----

static void trapped(int signal, siginfo_t *info, void *opaque) {
  (void)signal;
  ucontext_t *context = opaque;
  // The greg_t of x86_64 is signed; every argument fits an unsigned long on both.
  unsigned long a = REGISTER(context, REG_RDI, 0), b = REGISTER(context, REG_RSI, 1), c = REGISTER(context, REG_RDX, 2),
                d = REGISTER(context, REG_R10, 3), e = REGISTER(context, REG_R8, 4);
  int saved = errno, result;
  if (info->si_syscall == SYS_renameat2) {
    result = rename_any((int)a, (const char *)b, (int)c, (const char *)d, (unsigned)e);
#ifdef SYS_rename
  } else if (info->si_syscall == SYS_rename) {
    result = rename_any(AT_FDCWD, (const char *)a, AT_FDCWD, (const char *)b, 0);
#endif
  } else {
    result = rename_any((int)a, (const char *)b, (int)c, (const char *)d, 0);
  }
  REGISTER(context, REG_RAX, 0) = result < 0 ? -errno : result;
  errno = saved;
}

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define IF_EQUAL(value, skip_then, skip_else) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, skip_then, skip_else)
#ifdef SYS_rename
#define OLD_RENAME SYS_rename
#else
#define OLD_RENAME SYS_renameat
#endif

// Never undone, and inherited: children find their handler in this library, which LD_PRELOAD gives them too.
static int filter_renames(void) {
  static pid_t filtered;
  if (filtered == getpid()) return 0;
  struct sock_filter program[] = {
      LOAD(arch),
      IF_EQUAL(ARCHITECTURE, 0, 7),
      LOAD(nr),
      IF_EQUAL(OLD_RENAME, 4, 0),
      IF_EQUAL(SYS_renameat, 3, 0),
      IF_EQUAL(SYS_renameat2, 0, 3),
      LOAD(args[5]),  // The low half: both machines are little-endian.
      IF_EQUAL(PASSWORD, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog filter = {sizeof program / sizeof program[0], program};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return errno;
  // TSYNC: also for the threads that already exist. It may fail with a thread's id.
  long failed = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter);
  if (failed != 0) return failed > 0 ? ESRCH : errno;
  filtered = getpid();
  return 0;
}

// ---- For ctypes ----

// Returns 0 or an errno. `root` is absolute.
int faults_arm(const char *root, long nth, int action) {
  if (state == NULL) return ENOMEM;
  atomic_store(&state->armed, false);
  int failed = filter_renames();
  if (failed != 0) return failed;
  if (!absolute(AT_FDCWD, root, state->root) || realpath(root, state->real_root) == NULL) return ENOENT;
  size_t used = atomic_load(&state->trace_length);
  memset(state->trace, 0, used < TRACE_BYTES ? used : TRACE_BYTES);
  atomic_store(&state->trace_length, 0);
  atomic_store(&state->count, 0);
  atomic_store(&state->shortened, false);
  state->refused[0] = '\0';
  state->nth = nth;
  state->action = action;
  atomic_store(&state->armed, true);
  return 0;
}

// From now until the next arming, operations of these kinds fail with `error`. Returns 0 or an errno.
int faults_refuse(const char *kinds, int error) {
  if (state == NULL || strlen(kinds) + 3 > sizeof state->refused) return ENOMEM;
  state->refusal = error;
  snprintf(state->refused, sizeof state->refused, " %s ", kinds);
  return 0;
}

long faults_count(void) { return state != NULL ? atomic_load(&state->count) : 0; }

long faults_disarm(void) {
  if (state != NULL) atomic_store(&state->armed, false);
  return faults_count();
}

// Writes lines of "number kind path", numbers not strictly ordered across threads; returns the number of bytes.
size_t faults_trace(char *buffer, size_t size) {
  if (state == NULL) return 0;
  size_t used = atomic_load(&state->trace_length);
  if (used > TRACE_BYTES) used = TRACE_BYTES;
  memcpy(buffer, state->trace, used < size ? used : size);
  return used;
}

__attribute__((constructor)) static void begin(void) {
  void *memory = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory != MAP_FAILED) state = memory;
  struct sigaction handler = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGSYS, &handler, NULL);
}
