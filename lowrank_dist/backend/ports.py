"""TCP ports: opening one, the program that holds one, and the reason why one does not answer. Standard library only."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from lowrank_dist.backend.launchers import command_line

CONNECT_SECONDS = 5.0
# A program that speaks first does so within this time.
_GREETING_SECONDS = 1.0
_SILENT_SECONDS = 0.2
_BACKLOG = 2048  # connections that wait to be accepted; the kernel's own bound may be lower
_LISTENING = "0A"  # in /proc/net/tcp
_COMMAND = 80  # characters of a command line that are shown
# Errors that concern this process, not the port.
_OWN = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Unresolved(OSError):
    """A host name that has no address here."""


class Greeting(OSError):
    """A program that speaks first, which no store does; the text is what it says."""


def listen(port: int) -> socket.socket:
    """Return a socket that listens at `port` on all addresses. Raises OSError: EADDRINUSE, EACCES, …"""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=_BACKLOG)


def connect(host: str, port: int) -> socket.socket:
    """Return a connection. Raises Unresolved for a name without address, and OSError with the reason otherwise."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise Unresolved(error.strerror) from error
    except UnicodeError as error:  # "a..b", or a label of more than 63 characters
        raise Unresolved("not a host name") from error
    for family, kind, protocol, _, address in addresses:
        reached = socket.socket(family, kind, protocol)
        reached.settimeout(CONNECT_SECONDS)
        try:
            reached.connect(address)
            return reached
        except OSError as error:
            reached.close()
            last = error
    raise last


def unreachable(host: str, port: int) -> OSError | None:
    """Return the reason why no store can listen at `port` of `host`; None where one can.

    A store waits for its client to speak; it neither greets it nor closes the connection. Raises OSError where this
    process has no file descriptor or memory left.
    """
    try:
        with connect(host, port) as reached:
            reached.settimeout(_SILENT_SECONDS)
            said = _received(reached)
    except OSError as error:
        if error.errno in _OWN:
            raise
        return error
    if said is None:
        return None
    return Greeting(f"it says {said[:40]!r}") if said else ConnectionAbortedError("it closes connections at once")


def why(error: OSError) -> str:
    """Return the reason of a failed connection in words."""
    if isinstance(error, TimeoutError):
        return f"no answer to a connection within {CONNECT_SECONDS:.0f} s"
    return (error.strerror or str(error)).lower()


def describe_service(host: str, port: int) -> str:
    """Return what the program that listens there does with a connection, as "it …". Raises OSError as `unreachable`."""
    try:
        with connect(host, port) as reached:
            reached.settimeout(_GREETING_SECONDS)
            said = _received(reached)
            if said is None:
                reached.sendall(b"\r\n\r\n")  # to this HTTP servers answer
                said = _received(reached)
    except OSError as error:
        if error.errno in _OWN:
            raise
        return f"it ends connections ({error.strerror or error})"
    if said is None:
        return "it accepts connections and never answers"
    return f"it answers {said[:40]!r}" if said else "it closes connections at once"


def _received(reached: socket.socket) -> bytes | None:
    """Return what arrives first: b"" where the other side closed the connection, None where nothing arrives in time."""
    try:
        return reached.recv(256)
    except TimeoutError:
        return None


def holder(port: int) -> str | None:
    """Return "process 12 (COMMAND)" for the process that listens at `port` of this host; None where it is not seen.

    The processes of other users are not seen.
    """
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    for link in Path("/proc").glob("[0-9]*/fd/*") if sockets else ():
        try:
            if str(link.readlink()) not in sockets:
                continue
        except OSError:  # closed meanwhile, or another user's
            continue
        process = link.parents[1]
        return f"process {process.name} ({' '.join(command_line(process))[:_COMMAND]})"
    return None


def _listening(port: int) -> list[str]:
    """Return the inodes of the sockets that listen at `port`."""
    found = []
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                found.append(fields[9])
    return found
