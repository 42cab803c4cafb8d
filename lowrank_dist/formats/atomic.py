"""Atomic creation of folders: a folder appears whole or not at all."""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from lowrank_dist.errors import DiskError, UserError

_MARK = ".lowrank_dist-tmp-"
# linux/fcntl.h and linux/fs.h; Python has no binding for renameat2.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_ANOTHER_FILE_SYSTEM = (
    "the file system may not have this operation, so give an output path on another one (lowrank-dist doctor CONFIG "
    "names what is missing)"
)
_ENDING = (signal.SIGTERM, signal.SIGHUP)
# Errors of FAT, SMB, FUSE and object stores for an operation that they do not have, such as a link or fsync of a
# folder. EXDEV: an overlay does not rename folders of its lower layers, those of a container's image.
UNSUPPORTED = frozenset(
    {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOTTY, errno.EXDEV}
)


def is_temporary(folder: Path) -> bool:
    """Return whether `folder` has the name of an unfinished folder of `atomic_folder`, which must never be read."""
    return folder.name.startswith(".") and _MARK in folder.name


def temporary_name(target: Path) -> Path:
    """Return an unused name beside `target` that `is_temporary` recognises."""
    return target.with_name(f".{target.name}{_MARK}{os.getpid()}-{secrets.token_hex(4)}")


def final_path(folder: Path) -> Path:
    """Return the folder that a temporary folder will become, for messages; any other folder is returned unchanged."""
    if not is_temporary(folder):
        return folder
    return folder.with_name(folder.name.removeprefix(".").rpartition(_MARK)[0])


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `target`; on success it is synced to disk and becomes `target`.

    Any exception removes the temporary folder and leaves `target` as it was. So does a SIGTERM or SIGHUP that would end
    the process. A SIGKILL leaves at most a folder that `is_temporary` recognises and that the next writer of `target`
    removes. Missing parents are created. With `replace` an existing folder is exchanged in one step (renameat2) and
    then removed.

    Raises UserError where `target` exists without `replace` or is no plain folder, and DiskError, naming the path, for
    every OSError inside the block: no space, no permission, a failing disk.
    """
    target = Path(os.path.abspath(target))
    _check_target(target, replace)
    temporary = temporary_name(target)
    with _signals_as_exceptions():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(target)
            temporary.mkdir()
            with _held(temporary):
                yield temporary
                _sync_tree(temporary)
                _check_target(target, replace)
                if replace and target.exists():
                    _exchange(temporary, target)
                else:
                    temporary.rename(target)
            sync(target.parent)
        except OSError as error:
            raise DiskError(_explain(error, target)) from error
        finally:
            # `temporary` is the old folder after an exchange, the unfinished one after a failure, and gone after a
            # rename.
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a folder while it is written; `_remove_abandoned` looks for the lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks, where no folder is removed as abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary folders that killed writers of `target` left: those that nobody has locked.

    An empty folder stays: its writer may be about to lock it.
    """
    for folder in [child for child in target.parent.iterdir() if is_temporary(child) and final_path(child) == target]:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.listdir(descriptor):
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit where they have their default action."""
    mine = threading.current_thread() is threading.main_thread()
    numbers = [number for number in _ENDING if mine and signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for each in numbers:  # a second signal would interrupt the cleanup
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _check_target(target: Path, replace: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target}: a file or a symbolic link, not a folder; give another output path")
    if target.exists() and not replace:
        raise UserError(f"{target}: already exists and is not overwritten; remove it or give another output path")


def _explain(error: OSError, target: Path) -> str:
    where = f" at {error.filename}" if error.filename is not None else ""
    remedy = {
        errno.ENOSPC: "free some space or give an output path on another disk",
        errno.EDQUOT: "your disk quota is used up, so free some space or give an output path on another disk",
        errno.EACCES: "give an output path where you may write",
        errno.ENAMETOOLONG: "give an output path with a shorter name (a temporary name beside it is 40 bytes longer)",
        errno.EROFS: "give an output path that is not read-only",
        errno.EFBIG: "a file may have 4 GiB on FAT, and what `ulimit -f` says: raise that, or give an output path on "
        "another file system",
        **dict.fromkeys(UNSUPPORTED - {errno.EACCES}, _ANOTHER_FILE_SYSTEM),
    }
    hint = f"; {remedy[error.errno]}" if error.errno in remedy else ""
    return f"{target}: could not be written ({error.strerror or error}{where}){hint}"


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def sync(path: Path) -> bool:
    """Flush a file, or the names in a folder, to disk. Returns False where the file system does not have the operation.

    The file is then written when the system chooses. A checkpoint that a power failure cuts off does not match its
    manifest, and resuming takes an older one.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def exchange_at_once(one: Path, other: Path) -> bool:
    """Swap two folders in one step. Returns False where the file system, or the C library, does not have that."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code not in UNSUPPORTED:
        raise OSError(code, os.strerror(code), str(other))
    return False


def _exchange(temporary: Path, target: Path) -> None:
    """Swap two folders: in one step where the file system can, else the target is missing for the time of a rename.

    A target that cannot be renamed is removed first.
    """
    if exchange_at_once(temporary, target):
        return
    old = temporary.with_name(f"{temporary.name}-old")
    try:
        target.rename(old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.rmtree(target)
        temporary.rename(target)
        return
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    old.rename(temporary)
