"""The inside of ``sandbox``: run as a file by a fresh interpreter, it shuts itself in and runs one program.

It reads a JSON job on standard input, and reports in lines of JSON to the open file it was given. It imports the
standard library alone: what a program could reach through this package is not there.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NEW_MOUNTS, _NEW_IPC, _NEW_USER = 0x00020000, 0x08000000, 0x10000000
_NEW_PROCESSES, _NEW_NETWORK = 0x20000000, 0x40000000
_REMOUNT_ALL, _PRIVATE = 0x4000, 0x40000
_NO_SUID, _NO_DEVICES = 2, 4
_MOUNT_SETATTR, _AT_ROOT, _RECURSIVE, _READ_ONLY = (
    442,
    -100,
    0x8000,
    1,
)  # of Linux 5.12, the same on all processors
_DEATH_SIGNAL, _DUMPABLE, _KEEP_CAPABILITIES, _NO_NEW_PRIVILEGES, _AMBIENT, _RAISE = 1, 4, 8, 38, 47, 2
_CAPABILITIES_3, _READ_ALL = 0x20080522, 2
_FILTER, _FILTERED, _ALLOWED, _DENIED = 22, 2, 0x7FFF0000, 0x00050000 | 1  # denied: EPERM
# Processor -> how the kernel calls it, and its numbers of socket and socketpair.
_PROCESSORS = {"x86_64": (0xC000003E, 41, 53), "aarch64": (0xC00000B7, 198, 199)}
_IO_URING, _FOREIGN_CALLS = 425, 0x40000000  # a second way to sockets; and x32's numbers
_INTERNET, _INTERNET_6, _KERNEL, _DATAGRAMS = 2, 10, 16, 2
_CLOSED_EVENTS = ("socket.", "ctypes.", "urllib.", "ftplib.", "smtplib.")
_NEW_PROGRAMS = ("subprocess.", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.exec", "pty.spawn")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
            "os.chown", "os.utime", "os.setxattr", "os.removexattr", "sqlite3.connect", "shutil.")  # fmt: skip
_CLOSED_MODULES = ("ctypes", "_ctypes", "_posixsubprocess", "cffi", "_cffi_backend")
_UNHEARD = ("mkfifo", "mknod", "pidfd_open")  # of ``os``: no hook is told of them


class _Attributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("so", ctypes.c_uint8),
        ("no", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class _Instructions(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint16), ("first", ctypes.POINTER(_Instruction))]


class _RefusedError(PermissionError):
    """What a program may not do here."""


class _AbsentError(ImportError):
    """A module that is not to be had here; packages that can do without it go on."""


def _called(result: int) -> bool:
    return result == 0


def _unshared(libc: Any) -> bool:
    """Whether this process got a network, processes and mounts of its own."""
    wanted = _NEW_NETWORK | _NEW_PROCESSES | _NEW_MOUNTS | _NEW_IPC
    user, group = os.getuid(), os.getgid()
    if user == 0 and _called(libc.unshare(wanted)):
        return True
    if not _called(libc.unshare(wanted | _NEW_USER)):
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError:
        return False
    return True


def _closed_files(libc: Any, folder: str, room: int) -> bool:
    """Whether all files are now read-only, but for a folder in memory that holds so many bytes."""
    if not _called(libc.mount(b"none", b"/", None, _REMOUNT_ALL | _PRIVATE, None)):
        return False
    wanted = _Attributes(set=_READ_ONLY)
    closed = libc.syscall(
        _MOUNT_SETATTR, _AT_ROOT, b"/", _RECURSIVE, ctypes.byref(wanted), ctypes.sizeof(wanted)
    )
    if not _called(closed):
        return False
    options = f"size={room},mode=1777".encode()
    if not _called(
        libc.mount(b"tmpfs", folder.encode(), b"tmpfs", _NO_SUID | _NO_DEVICES, ctypes.c_char_p(options))
    ):
        return False
    os.chdir(folder)
    # Its own processes alone; where that is not allowed, none: others' environments can be read there.
    return any(
        _called(libc.mount(kind, b"/proc", kind, _NO_SUID | _NO_DEVICES, None))
        for kind in (b"proc", b"tmpfs")
    )


def _readable(user: int) -> bool:
    """Whether a user can read the interpreter and its library."""
    os.setegid(user)
    os.seteuid(user)
    try:
        return all(
            os.access(path, os.R_OK | os.X_OK, effective_ids=True)
            for path in (sys.executable, sys.prefix, str(Path(os.__file__).parent))
        )
    finally:
        os.seteuid(0)
        os.setegid(0)


def _counted(libc: Any, user: int) -> bool:
    """Whether the number of processes can be limited: root's is not, so root becomes a user that nobody is.

    No rights are left in the end: whoever has them in a world of its own can make its files writable again.
    """
    if os.getuid() != 0:
        return _rights(libc, 0)
    try:
        os.setgroups([])
        hidden = not _readable(user)
        if hidden:
            libc.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
        os.setgid(user)
        os.setuid(user)
    except OSError:
        return False
    # An interpreter in root's own folder is read by the one capability that is kept; all others are gone.
    if not _rights(libc, 1 << _READ_ALL if hidden else 0):
        return False
    if hidden:
        libc.prctl(_AMBIENT, _RAISE, _READ_ALL, 0, 0)
    # What Linux tells of a process that changed its user is root's to read, until it says that it may be.
    libc.prctl(_DUMPABLE, 1, 0, 0, 0)
    return True


def _rights(libc: Any, kept: int) -> bool:
    """Whether this process now has these capabilities and no others."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
    rights = (ctypes.c_uint32 * 6)(kept, kept, kept, 0, 0, 0)
    return _called(libc.capset(ctypes.byref(header), ctypes.byref(rights)))


def _own_sockets(libc: Any) -> bool:
    """Whether the kernel now gives this process sockets of its own network alone.

    A network of its own is none for sockets that are files, such as a session's bus or a container service's, nor
    for those to the machine that hosts a virtual one. So only internet sockets are left, and pairs, which event loops
    take; these not of datagrams, which can be sent to any such file.
    """
    known = _PROCESSORS.get(os.uname().machine)
    if known is None or sys.maxsize <= 1 << 32:
        return False
    processor, socket, pair = known
    load, equal, at_least, mask, end = 0x20, 0x15, 0x35, 0x54, 0x06
    program = [
        (load, 0, 0, 4),  # the processor
        (equal, 0, 14, processor),
        (load, 0, 0, 0),  # the call
        (at_least, 12, 0, _FOREIGN_CALLS),
        (equal, 11, 0, _IO_URING),
        (equal, 2, 0, socket),
        (equal, 5, 0, pair),
        (end, 0, 0, _ALLOWED),
        (load, 0, 0, 16),  # the kind of address
        (equal, 5, 0, _INTERNET),
        (equal, 4, 0, _INTERNET_6),
        (equal, 3, 4, _KERNEL),  # of its own network: names are looked up with it
        (load, 0, 0, 24),  # the kind of socket
        (mask, 0, 0, 0xF),
        (equal, 1, 0, _DATAGRAMS),
        (end, 0, 0, _ALLOWED),
        (end, 0, 0, _DENIED),
    ]
    listed = (_Instruction * len(program))(*(_Instruction(*one) for one in program))
    wanted = _Instructions(len(program), listed)
    return _called(libc.prctl(_FILTER, _FILTERED, ctypes.byref(wanted), 0, 0))


def _limit(job: dict[str, Any]) -> None:
    seconds = int(job["seconds"]) + 2
    wanted = {
        resource.RLIMIT_AS: job["memory"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_NPROC: job["processes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, most in wanted.items():
        _, hard = resource.getrlimit(kind)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that is too large is an OSError


def _refuse(folder: str, *, network: bool, processes: bool, files: bool) -> None:
    """From here on this interpreter refuses what the kernel does not: a hook that cannot be taken away again."""
    inside = str(Path(folder).resolve())

    def outside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        real = os.path.realpath(os.fsdecode(path))
        return real != inside and not real.startswith(inside + os.sep) and real != os.devnull

    def opened(path: object, flags: int) -> None:
        if not outside(path):
            return
        real = Path(os.path.realpath(os.fsdecode(path)))  # type: ignore[arg-type]
        _, first, second = [*real.parts, "", "", ""][:3]
        others = first == "proc" and second.isdecimal() and second != str(os.getpid())
        # Names relative to an open folder are not told.
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) or others or real.is_dir():
            raise _RefusedError(f"{path!r} cannot be opened here")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if network and event.startswith(_CLOSED_EVENTS):
            raise _RefusedError(f"{event} is not allowed here")
        if processes and event.startswith(_NEW_PROGRAMS):
            raise _RefusedError(f"{event} is not allowed here")
        if processes and (event == "os.killpg" or (event == "os.kill" and arguments[0] != os.getpid())):
            raise _RefusedError(f"{event} is not allowed here")
        if event == "import" and str(arguments[0]) in _CLOSED_MODULES:
            raise _AbsentError(f"{arguments[0]} is not allowed here")
        if files and event == "open":
            opened(arguments[0], arguments[2])
        elif files and event.startswith(_CHANGES) and any(map(outside, arguments)):
            raise _RefusedError(f"{event} is not allowed here")

    for name in _UNHEARD:
        for module in (os, sys.modules[os.name]):
            vars(module).pop(name, None)
    sys.addaudithook(hook)


def _run(program: str, tell: Callable[[dict[str, Any]], None], word: str) -> None:
    """Run a program in this process; say the word if it came to its end."""
    for name in ("ctypes", "_ctypes"):  # a program that may have them imports them itself
        sys.modules.pop(name, None)
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), {"__name__": "__main__"})
    except BaseException as error:  # noqa: BLE001  every end of a foreign program is told
        last = traceback.format_exception_only(error)[-1].strip()
        tell({"error": type(error).__name__, "why": last[:500]})
        return
    tell({"word": word})


def _supervised(
    job: dict[str, Any], tell: Callable[[dict[str, Any]], None], *, shut: Callable[[], None]
) -> None:
    """Run the program in a child until it ends or its time is up."""
    child = os.fork()
    if child == 0:
        try:
            shut()
            _run(job["program"], tell, job["word"])
        finally:
            os._exit(0)
    until = time.monotonic() + job["seconds"]
    while time.monotonic() < until:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == child:
            if os.WIFSIGNALED(status):
                tell({"signal": os.WTERMSIG(status)})
            return
        if ended == 0:
            time.sleep(0.005)
    tell({"timeout": True})
    os.kill(child, signal.SIGKILL)


def main() -> None:
    """Read the job, shut this process in as far as the system allows, say how far, and run it."""
    report, folder, user = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    job = json.loads(sys.stdin.buffer.read())
    sys.path.append(job["packages"])  # without what ``site`` would run of them
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)

    def tell(message: dict[str, Any]) -> None:
        os.write(report, json.dumps(message).encode() + b"\n")

    libc = ctypes.CDLL(None, use_errno=True)
    apart = bool(job["namespaces"]) and sys.platform == "linux" and _unshared(libc)
    if apart:
        first = os.fork()  # the first process of its own world: when it ends, all others there do
        if first:
            os.waitpid(first, 0)
            return
        libc.prctl(_DEATH_SIGNAL, signal.SIGKILL)
    files = apart and _closed_files(libc, folder, job["room"])

    def shut() -> None:
        counted = apart and _counted(libc, user)
        if sys.platform == "linux":
            libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        network = apart and _own_sockets(libc)
        tell({"network": network, "processes": counted, "files": files})
        _limit(job)
        if not (network and counted and files):
            _refuse(folder, network=not network, processes=not counted, files=not files)

    _supervised(job, tell, shut=shut)


if __name__ == "__main__":
    main()
