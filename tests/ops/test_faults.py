"""What the kernels do when the system gives them nothing: a named error, and everything usable afterwards.

Every request for memory or for a thread that the library makes passes one place (csrc/memory.cpp), which counts them and
lets any one fail. So each operation is run with its first request failing, then its second, and so on to the last.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quadriga import runtime
from quadriga.errors import CheckpointError, ConfigError, EngineError, HardwareError
from quadriga.io.convert import convert
from quadriga.io.open import open_checkpoint
from quadriga.io.packed import load_packed
from quadriga.kernels.arrays import arrays
from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu import packing
from quadriga.kernels.cpu.bindings import MOST_THREADS, Allocations
from quadriga.kernels.cpu.expert_store import ExpertStore
from quadriga.kernels.cpu.packing import Parameter
from quadriga.kernels.training import fused
from quadriga.nn.transformer import random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters
from tests.batches import batch, logits_of
from tests.checkpoint.models import TINY, write_hf
from tests.packing import linear, pack

MOST_SECONDS = 300
"""Until a hang is called one; nothing here takes a hundredth of it."""


def watch(number: int) -> Allocations:
    """Let the library's request of this number fail; what it asked for since the last call."""
    seen = Allocations()
    cpu.call(cpu.library().qd_watch_allocations, number, seen)
    return seen


def fail_each(run: Callable[[], object], again: Callable[[], None]) -> int:
    """Run with the first request failing, the second, and so on until all are met; after each, ``again``.

    Returns:
        How many requests there are. All are made by the thread that calls: none by one that is at work in a phase.
    """
    number = 0
    while True:
        watch(number)
        try:
            try:
                run()
            finally:
                seen = watch(-2)
        except HardwareError as error:
            assert seen.failed == 1
            assert "out of memory" in str(error) or "no more threads" in str(error)
        assert seen.elsewhere == 0, "scratch is reserved before a phase, so no worker asks for memory"
        again()
        if not seen.failed:
            return number
        number += 1


def n_threads() -> int:
    gc.collect()  # what an earlier test has left in a cycle has threads too, and must not end in between
    return len(list(Path("/proc/self/task").iterdir()))


def n_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("threads", [1, 4])
def test_making_a_context(threads: int) -> None:
    before = n_threads()
    requests = fail_each(lambda: cpu.Context(threads), lambda: None)
    assert requests >= 2 * threads, "its memory, and each thread with its own"
    assert n_threads() == before, "a context that could not be made has ended the threads it had started"


# Each operation on a context of its own, so that all its scratch is asked for ------------------------------------------


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=1)
def matrix() -> packing.Packed:
    return pack(values(70, 96), "q4")


def training(context: cpu.Context, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(fused, "_context", lambda: context)
    scores, logits = values(2, 9, 3, 40, seed=1), values(20, 1000, seed=2)
    lows = torch.arange(9)
    p = fused.windowed_softmax(scores, lows, 31, torch.rand(6, generator=torch.Generator().manual_seed(3)))
    losses = fused.cross_entropy(logits, torch.arange(20), 0.7, gradient=True)
    return torch.cat((p.flatten(), losses, logits.flatten()))


OPERATIONS: dict[str, Callable[[cpu.Context, pytest.MonkeyPatch], Tensor]] = {
    "few rows": lambda context, _: linear(matrix(), values(3, 96), context),
    "many rows": lambda context, _: linear(matrix(), values(200, 96), context),
    "widened": lambda context, _: linear(pack(values(70, 512), "q6k"), values(200, 512), context),
    "training": training,
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_fails_by_name_and_works_again(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = OPERATIONS[name](cpu.Context(threads), monkeypatch)
    contexts: list[cpu.Context] = []

    def run() -> None:
        contexts.append(cpu.Context(threads))
        OPERATIONS[name](contexts[-1], monkeypatch)

    def again() -> None:
        if contexts:
            assert torch.equal(OPERATIONS[name](contexts.pop(), monkeypatch), expected)

    assert fail_each(run, again) > threads


# Whole passes ----------------------------------------------------------------------------------------------------------

LONG = replace(TINY["dbrx"], max_seq_len=1024).with_n_layers(1)
MODELS = {
    "mixture, router": (LONG, "q4"),
    "mixture, router, widened experts": (LONG, "q6k"),
    "post-norms, soft cap": (replace(TINY["grok1"], max_seq_len=1024).with_n_layers(1), "q8"),
    "dense, alibi": (replace(TINY["mpt"], max_seq_len=1024).with_n_layers(1), "bfloat16"),
}


@lru_cache(maxsize=4)
def parameters(name: str) -> dict[str, Parameter]:
    config, form = MODELS[name]
    return pack_parameters(arrays(random_parameters(config, seed=3, std=0.25)), form)


def passes(model: CompiledModel) -> Tensor:
    """A long prompt beside a short one, then a token of each: keys in chunks, pieces, merges."""
    tokens = [(7 * i + 3) % 97 for i in range(301)]
    blocks = list(range(1, 20))
    prompt = logits_of(model, batch([(tokens[:300], 0, blocks), (tokens[:5], 0, [0])]))
    step = logits_of(model, batch([(tokens[300:], 300, blocks), (tokens[5:8], 5, [0])]))
    return torch.cat((prompt, step))


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_fails_by_name_and_the_model_works_again(name: str) -> None:
    def fresh() -> CompiledModel:
        return CompiledModel(MODELS[name][0], parameters(name), threads=2, n_blocks=20)

    expected = passes(fresh())
    models: list[CompiledModel] = []

    def run() -> None:
        models.append(fresh())
        passes(models[-1])

    def again() -> None:
        if models:
            assert torch.equal(passes(models.pop()), expected)

    assert fail_each(run, again) > 30


def on_disk(folder: Path) -> CompiledModel:
    """A model whose experts are in folder/out, one layer's of them in memory and no more."""
    write_hf(folder / "hf", TINY["dbrx"], parameters=random_parameters(TINY["dbrx"], std=0.3))
    convert(folder / "hf", folder / "out", format="q8")
    packed = load_packed(open_checkpoint(folder / "out"), expert_memory=1)
    return CompiledModel(TINY["dbrx"], packed.parameters, threads=2, n_blocks=20, store=packed.store)


def test_experts_on_disk_are_as_they_were_after_a_failure(tmp_path: Path) -> None:
    """What was being brought in when memory ran out is not taken for an expert later."""
    model = on_disk(tmp_path)
    one, other = ([(5 * i + k) % 97 for i in range(20)] for k in (1, 2))

    def run() -> Tensor:
        return torch.cat([logits_of(model, batch([(tokens, 0, [0, 1])])) for tokens in (one, other)])

    expected = run()
    again = fail_each(run, lambda: torch.testing.assert_close(run(), expected, rtol=0, atol=0))
    assert again > 30


@pytest.mark.parametrize("readers", [1, 3])
def test_making_a_store(readers: int, tmp_path: Path) -> None:
    (tmp_path / "experts").write_bytes(bytes(4096))
    extents = [[[("experts", 0, 64)]]]
    before, files = n_threads(), n_files()
    requests = fail_each(lambda: ExpertStore(tmp_path, extents, budget=1, readers=readers), lambda: None)
    assert requests > 2 * readers
    assert n_threads() == before
    assert n_files() == files, "the files of a store that could not be made are closed"


def test_a_read_that_fails_is_an_error_of_that_pass_only(tmp_path: Path) -> None:
    """Not of every pass from then on: what could not be read is asked for again."""
    model = on_disk(tmp_path)
    passes_over = batch([([1, 2, 3, 4, 5], 0, [0])])
    expected = logits_of(model, passes_over)
    files = {file: file.read_bytes() for file in (tmp_path / "out").glob("*.packed")}
    for file in files:
        os.truncate(file, 0)
    with pytest.raises(CheckpointError, match="cut short"):
        logits_of(model, passes_over)
    for file, content in files.items():
        file.write_bytes(content)
    assert torch.equal(logits_of(model, passes_over), expected)


# Threads -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, -1, MOST_THREADS + 1, 40000, 10**6, 2**32 + 1, 1.5, "2", None])
def test_a_number_of_threads_that_cannot_be(threads: object) -> None:
    with pytest.raises(ConfigError, match=r"threads must be a whole number from 1 to 1024, got"):
        cpu.Context(threads)  # type: ignore[arg-type]
    if threads is not None:  # all processors
        with pytest.raises(ConfigError, match=r"threads must be a whole number from 1 to 1024, got"):
            runtime.n_threads(threads)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [0, -1, MOST_THREADS + 1, 10**6])
def test_the_library_bounds_threads_itself(threads: int) -> None:
    with pytest.raises(ConfigError, match=rf"threads must be from 1 to 1024, got {threads}"):
        cpu.call(cpu.library().qd_create, threads, 0, ctypes.byref(ctypes.c_void_p()))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_what_a_worker_throws_reaches_the_caller(threads: int) -> None:
    context = cpu.Context(threads)
    for _ in range(20):
        with pytest.raises(EngineError, match=rf"thread \d of {threads} threw") as caught:
            context.call(context.lib.qd_throw_in_phase)
        assert (f"thread 0 of {threads}" in str(caught.value)) == (threads == 1), "a worker threw, not the caller"
        assert torch.equal(linear(matrix(), values(40, 96), context), linear(matrix(), values(40, 96)))


def test_threads_that_share_a_context_take_turns() -> None:
    """Each gets its own result; none waits for ever."""
    context, expected = cpu.Context(2), [linear(matrix(), values(n, 96, seed=n)) for n in range(1, 5)]
    together, wrong = threading.Barrier(4), []

    def work(n: int) -> None:
        x = values(n, 96, seed=n)
        together.wait(MOST_SECONDS)
        for _ in range(300):
            if not torch.equal(linear(matrix(), x, context), expected[n - 1]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(MOST_SECONDS)
        assert not worker.is_alive(), "a thread waits for ever"
    assert not wrong


def run_apart(script: str, **limits: int) -> str:
    """A script in a process of its own, whose resources are bounded; what it printed."""
    head = "import resource, sys\nimport torch\nfrom quadriga.errors import *\nfrom quadriga.kernels.cpu import library as cpu\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(script)],
        capture_output=True, text=True, timeout=MOST_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


LEAVE = """
    def leave(nbytes):
        used = 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1])
        resource.setrlimit(resource.RLIMIT_AS, (used + nbytes, resource.RLIM_INFINITY))
"""


def test_a_process_without_memory_for_its_threads_says_so_and_goes_on() -> None:
    out = run_apart(
        LEAVE
        + """
    cpu.library()
    leave(64 << 20)  # a thread's stack takes some megabytes
    try:
        cpu.Context(1000)
    except HardwareError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    context = cpu.Context(3)
    try:
        context.call(context.lib.qd_throw_in_phase)
    except EngineError as error:
        print(error)
    """
    )
    assert "starts no more threads: of 1000 threads only" in out
    assert "of 3 threw" in out


def test_a_process_without_memory_for_a_pass_says_so_and_goes_on() -> None:
    out = run_apart(
        LEAVE
        + """
    from quadriga.kernels.cpu.packing import pack, linear
    matrix, context = pack(torch.eye(64).numpy(), "float32"), cpu.Context(2)
    many, few = torch.rand(400_000, 64), torch.rand(5, 64)
    out = torch.empty(400_000, 64)
    leave(32 << 20)
    try:  # activations of 100 MB
        context.call(context.lib.qd_linear, matrix.struct(), many.data_ptr(), len(many), out.data_ptr())
    except HardwareError as error:
        print(error)
    print(torch.equal(torch.from_numpy(linear(matrix, few.numpy(), context)), few))
    """
    )
    assert "out of memory in the CPU kernels" in out and "max_batch_tokens" in out
    assert out.endswith("True\n")


def test_a_fork_of_the_process_computes_and_ends(tmp_path: Path) -> None:
    """It has none of the context's threads: it does their work itself, and waits for none of them at the end."""
    out = run_apart(
        """
    import os
    from quadriga.kernels.cpu.packing import pack, linear
    from quadriga.kernels.cpu.expert_store import ExpertStore
    from pathlib import Path
    import tempfile
    context, matrix, x = cpu.Context(3), pack(torch.eye(64).numpy(), "float32"), torch.rand(50, 64)
    folder = Path(tempfile.mkdtemp())
    (folder / "experts").write_bytes(bytes(4096))
    store = ExpertStore(folder, [[[("experts", 0, 64)]]], budget=1, readers=2)
    assert torch.equal(torch.from_numpy(linear(matrix, x.numpy(), context)), x)
    child = os.fork()
    if not child:
        good = torch.equal(torch.from_numpy(linear(matrix, x.numpy(), context)), x)
        del context, store
        os._exit(0 if good else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    )
    assert out == "0\n"
