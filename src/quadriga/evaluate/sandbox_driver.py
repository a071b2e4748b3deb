"""Runs inside the sandbox: sets limits, runs the program, writes the word. Standard library only.

Passed as text to a fresh interpreter with -c; never imported by the rest of the package.
"""


def main() -> None:
    """Read the job from standard input, run it, and write the verdict to the job's pipe."""
    import json
    import os
    import resource
    import sys

    job = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    program, word, fd = job["program"], job["word"].encode(), job["fd"]
    if job["read_only"]:
        _close_files(sys.base_prefix)
        os.chdir("/tmp")
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    os.set_inheritable(fd, False)
    write, leave = os.write, os._exit
    del job
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: exiting before the end is a failure
        text = f"{type(error).__name__}: {error}"[:500].encode(errors="replace")
        write(fd, b"failed " + word + b"\n" + text)
        leave(1)
    write(fd, b"passed " + word + b"\n")
    leave(0)


def _close_files(prefix: str) -> None:
    """Make every mount of this name space read-only and put an empty /tmp over the old one (the unshare kind).

    If the interpreter is inside a folder that only root may enter, that folder is covered by an empty one and only the
    interpreter's prefix is mounted back, because the program runs as another user.
    """
    import ctypes
    import os

    libc = ctypes.CDLL(None, use_errno=True)
    read_only, nosuid, nodev, noexec, noatime, remount, bind, private = 1, 2, 4, 8, 1024, 32, 4096, 1 << 18 | 1 << 14
    words = {"nosuid": nosuid, "nodev": nodev, "noexec": noexec, "noatime": noatime, "relatime": 1 << 21}

    def mount(source: "bytes | None", target: bytes, kind: "bytes | None", flags: int, data: "bytes | None") -> None:
        if libc.mount(source, target, kind, ctypes.c_ulong(flags), data):
            raise OSError(ctypes.get_errno(), f"cannot mount {target.decode(errors='replace')}")

    mount(None, b"/", None, private, None)
    mount(b"tmpfs", b"/tmp", b"tmpfs", nosuid | nodev, b"size=16m,mode=1777")
    top = "/" + prefix.split("/")[1]
    if os.getuid() == 0 and top != "/usr":
        os.mkdir("/tmp/keep")  # noqa: PTH102 - pathlib costs 10 ms here
        mount(prefix.encode(), b"/tmp/keep", None, bind, None)
        mount(b"tmpfs", top.encode(), b"tmpfs", nosuid | nodev, b"size=1m,mode=755")
        os.makedirs(prefix)  # noqa: PTH103
        mount(b"/tmp/keep", prefix.encode(), None, bind, None)
        libc.umount(b"/tmp/keep")
        os.rmdir("/tmp/keep")  # noqa: PTH106
    with open("/proc/self/mountinfo", "rb") as file:  # noqa: PTH123 - pathlib costs 10 ms here
        mounts = [line.split() for line in file]
    for fields in mounts:
        target = fields[4].decode("unicode_escape").encode("latin-1")
        if target in (b"/tmp", b"/proc") or target.startswith(b"/dev"):
            continue
        flags = sum(words.get(word, 0) for word in fields[5].decode().split(","))
        try:
            mount(None, target, None, remount | bind | read_only | flags, None)
        except OSError as error:
            if error.errno not in (2, 13):  # hidden under another mount, so it cannot be reached
                raise


main()
