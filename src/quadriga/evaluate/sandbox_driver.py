"""Runs inside the sandbox: closes it, sets limits, runs the program, writes the word. Standard library only.

Passed as text to a fresh interpreter with -c; never imported by the rest of the package. The calls of ``os`` in place
of pathlib, whose import takes 10 ms.
"""
# ruff: noqa: PTH102, PTH103, PTH123, PTH211

PRIVATE, BIND, REMOUNT, READ_ONLY, NOSUID, NODEV, DETACH = 1 << 18 | 1 << 14, 4096 | 1 << 14, 32 | 4096, 1, 2, 4, 2
KEPT_FLAGS = {"nosuid": NOSUID, "nodev": NODEV, "noexec": 8, "noatime": 1024, "relatime": 1 << 21}
"""Of a mount, as /proc/self/mountinfo names them: who is root of a user name space only cannot take them away."""
DEVICES = ("null", "zero", "full", "random", "urandom")


def main() -> None:
    """Read the job from standard input, run it, and write the verdict to the job's pipe."""
    import json
    import os
    import resource
    import sys

    with open(0, "rb", buffering=0) as file:
        job = json.loads(file.read())
    os.open(os.devnull, os.O_RDONLY)  # becomes 0, which is free
    program, fd = job["program"], job["fd"]
    for group in job["groups"]:
        os.write(group, b"0")
        os.close(group)
    if job["new_root"] is not None:
        _enter_new_root(**job["new_root"])
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if job["closed"]:
        _give_up_rights(os.uname().machine)
    os.set_inheritable(fd, False)
    if job["paths"]:
        sys.path += job["paths"]
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # each thread of it takes address space and counts as a process
    sys.modules.pop("json")
    write, leave, verdict = os.write, os._exit, [b"%s " + job.pop("word").encode() + b"\n%s"]
    del job
    _refuse_sight(sys.addaudithook)
    # While the program runs the word is in no variable of any frame, only on this frame's stack of values; and no
    # function that has it as an argument is called afterwards, as one that traces or profiles calls would see it.
    leave(write(fd, verdict.pop() % _run(program)) and 0)


def _run(program: str) -> "tuple[bytes, bytes]":
    """(passed, nothing) if the program came to its end, else (failed, why)."""
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: exiting before the end is a failure
        return b"failed", f"{type(error).__name__}: {error}"[:500].encode(errors="replace")
    return b"passed", b""


def _refuse_sight(add_hook) -> None:  # type: ignore[no-untyped-def]
    """Refuse what shows a program the frames of its caller at work, or the values on their stacks, for good."""
    refused = frozenset(
        ("gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys.settrace", "sys.setprofile")
        + ("sys.monitoring.register_callback",)
    )

    def hook(event: str, arguments: object) -> None:
        if event in refused:
            raise RuntimeError(f"{event} is refused to programs")

    add_hook(hook)


def _enter_new_root(shown: "list[str]", links: "dict[str, str]", tmp_bytes: int) -> None:
    """Make a root of the folders and files in ``shown``, read-only, beside /proc, five devices and an empty /tmp.

    Of everything else on this machine no name is left (the unshare kind; bwrap does the same by itself).
    """
    import ctypes
    import os

    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), f"{name}{arguments} failed")

    def mount(source: "str | None", target: str, kind: "str | None", flags: int, data: "str | None" = None) -> None:
        texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
        call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])

    mount(None, "/", None, PRIVATE)
    # Where the new root is built must not hide what is to be shown in it.
    root = next(place for place in ("/tmp", "/var") if not any(path.startswith(place + "/") for path in shown))
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.mkdir(root + "/dev")
    os.mkdir(root + "/tmp")
    # First: what is shown may lie under this machine's /tmp (a virtual environment does), and must not be hidden.
    mount("tmpfs", root + "/tmp", "tmpfs", NOSUID | NODEV, f"size={tmp_bytes},mode=1777")
    for path in [*shown, "/proc", *(f"/dev/{name}" for name in DEVICES)]:
        if os.path.isdir(path):  # noqa: PTH112
            os.makedirs(root + path)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)  # noqa: PTH120
            os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY))
        mount(path, root + path, None, BIND)
    for path, target in links.items():
        os.symlink(target, root + path)
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = [line.split() for line in file]
    for fields in mounts:
        target = os.fsdecode(fields[4].decode("unicode_escape").encode("latin-1"))
        if target == root or target.startswith((root + "/usr", *(root + path for path in shown))):
            flags = sum(KEPT_FLAGS.get(word, 0) for word in fields[5].decode().split(","))
            mount(None, target, None, REMOUNT | READ_ONLY | flags)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", DETACH)
    os.chdir("/tmp")


# Calls with which a program would make name spaces or mounts, look into other processes, or reach seldom used parts of
# the kernel: clone, clone3, then those that are refused whatever they ask for.
CALLS = {
    "x86_64": (0xC000003E, 56, 435, (
        101, 155, 161, 165, 166, 248, 249, 250, 272, 298, 304, 308, 310, 311, 321, 323, 425, *range(428, 434), 442,
    )),
    "aarch64": (0xC00000B7, 220, 435, (
        39, 40, 41, 51, 97, 117, 217, 218, 219, 241, 265, 268, 270, 271, 280, 282, 425, *range(428, 434), 442,
    )),
}  # fmt: skip
NAME_SPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET


def _give_up_rights(machine: str) -> None:
    """Give up capabilities, new rights by programs, other processes' sight of this one, and the calls of ``CALLS``."""
    import ctypes
    import struct

    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), f"{name}{arguments} failed")

    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: its /proc/self/mem belongs to root
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    arch, clone, clone3, refused = CALLS[machine]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, not_permitted, unknown = 0x7FFF0000, 0x80000000, 0x50000 | 1, 0x50000 | 38
    # (code, jump if true, jump if false, operand); the call is at 0, the machine at 4, the first argument at 16.
    filter_ = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, kill), (load, 0, 0, 0)]
    filter_ += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, not_permitted)]  # x32's numbers
    for number in refused:
        filter_ += [(equal, 0, 1, number), (answer, 0, 0, not_permitted)]
    filter_ += [(equal, 0, 1, clone3), (answer, 0, 0, unknown)]  # C libraries then use clone, whose flags can be seen
    filter_ += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, NAME_SPACES), (answer, 0, 0, not_permitted)]
    filter_ += [(answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in filter_))
    call("prctl", 22, 2, struct.pack("HP", len(filter_), ctypes.addressof(code)))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


main()
