"""The process that renders: bounds on memory, time and output, and how it lives and dies.

Bounds are tested with small budgets, so that reaching them takes little, and by counting: processes, answers,
characters. The only clocks are guards against hanging.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from quadriga.errors import TemplateError
from quadriga.text import chat, template_process
from quadriga.text.template_process import Budget, children, render_texts
from quadriga.text.tokenizer import load_gguf
from tests.text import vocabularies
from tests.waiting import until

GUARD_S = 300
MESSAGES = [{"role": "user", "content": "Hi"}]
SMALL = Budget(cpu_s=0.3, memory_bytes=64 << 20, chars=10_000)


def render(template: str, budget: Budget = SMALL) -> str:
    return render_texts(template, {"bos_token": "<s>"}, MESSAGES, [(1, True)], budget)[0]


def still_renders() -> None:
    assert render("{{ messages[0].content }}") == "Hi"


MEMORY = {
    "product": "{{ 'a' * 10**9 }}",
    "product of a product": "{% set x = 'a' * 10**6 %}{{ (x * 10**6) | length }}",
    "list product": "{{ ([1] * 10**9) | length }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent in a filter": "{{ '%0999999999d' | format(1) }}",
    "format": "{{ '{:>500000000}'.format('a') }}",
    "format of a number": "{{ '{:999999999d}'.format(1) | length }}",
    "center": "{{ 'a' | center(10**9) }}",
    "methods": "{{ 'a'.rjust(10**9) | length }}",
    "zfill": "{{ '1'.zfill(10**9) | length }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) | length }}",
    "indent": "{{ 'a\\nb' | indent(10**9) }}",
    "tojson": "{{ messages | tojson(indent=200000000) }}",
    "tojson separators": "{{ [1, 2, 3] | tojson(separators=('a' * 10**8, ':')) }}",
    "join": "{{ (range(100000) | list) | join('a' * 100000) }}",
    "replace": "{{ ('a' * 10**6) | replace('a', 'b' * 10**4) }}",
    "replacing twice": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "doubling text": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling with join": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling with split": "{% set ns = namespace(x='a,a') %}{% for i in range(60) %}{% set ns.x = (ns.x.split(',') + ns.x.split(',')) | join(',') %}{% endfor %}",
    "doubling in a block": "{% set x = 'aaaaaaaa' %}"
    + "{% set x %}{{ x }}{{ x }}{{ x }}{{ x }}{% endset %}" * 20
    + "{{ x | length }}",
    "raising": "{{ raise_exception('x' * 10**9) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list | length }}",
    "a literal": "{% set x = [" + "[0] * 10**7, " * 99 + "] %}",
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_bounded(name: str) -> None:
    with pytest.raises(TemplateError, match="more than 64 MB of memory"):
        render(MEMORY[name], Budget(cpu_s=60, memory_bytes=64 << 20, chars=1 << 30))
    still_renders()


TIME = {
    "ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ (2 ** (2 ** 25)) % 7 }}{{ (3 ** (3 ** 16)) % 7 }}",
    "searching": "{{ ('a' * 10**6 + 'b').count('a' * 5 * 10**5 + 'b') }}" * 2000,
    "sorting": "{% for i in range(99999) %}{% set x = range(99999) | list | sort(reverse=true) %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for a in [9] recursive %}{% for i in range(99999) %}{{ loop([]) if false }}{% set x = range(9999) | sum %}{% endfor %}{% endfor %}",
    "compiling": "{{ 1 }}" * 25_000,
    "numbers": "{% set ns = namespace(x=3) %}{% for i in range(30) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
}


@pytest.mark.parametrize("name", TIME)
def test_time_is_bounded_whatever_the_interpreter_is_busy_with(name: str) -> None:
    with pytest.raises(TemplateError, match=r"more than 0\.1 s of processor time"):
        render(TIME[name], Budget(cpu_s=0.1, memory_bytes=1 << 30, chars=1 << 30))
    still_renders()


OUTPUT = {
    "loop": "{% for i in range(10**5) %}x{% endfor %}",
    "loops": "{% for i in range(10**5) %}{% for j in range(10**5) %}x{% endfor %}{% endfor %}",
    "date": "{{ strftime_now('%c' * 10**4) }}",
    "text": "{{ 'x' * 10001 }}",
}


@pytest.mark.parametrize("name", OUTPUT)
def test_output_is_bounded(name: str) -> None:
    before = children.n_started
    still_renders()
    with pytest.raises(TemplateError, match="more than 10000 characters"):
        render(OUTPUT[name], Budget(cpu_s=60, memory_bytes=64 << 20, chars=10_000))
    still_renders()
    assert children.n_started - before <= 1  # counted while it is made: nothing had to be ended
    assert render("{{ 'x' * 10000 }}", SMALL) == "x" * 10_000


DEPTH = {
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two macros": "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
    "loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "caller": "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}",
    "printing": "{% set ns = namespace(x=[]) %}{% for i in range(5000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "nots": "{{ " + "not " * 20_000 + "1 }}",
    "filters": "{{ 1" + " | string" * 9000 + " }}",
}


@pytest.mark.parametrize("name", DEPTH)
def test_depth_ends_in_an_error(name: str) -> None:
    with pytest.raises(TemplateError, match=r"^the chat template cannot render these messages: \w"):
        render(DEPTH[name], Budget(cpu_s=10, memory_bytes=256 << 20, chars=10_000))
    still_renders()


def test_a_conversation_adds_to_the_memory_its_template_may_take() -> None:
    """The bound is on what a template does, not on what people say."""
    messages = [{"role": "user", "content": "ü🙂" * 2_000_000}]
    budget = Budget(cpu_s=60, memory_bytes=32 << 20, chars=1 << 30)
    assert render_texts("{{ messages[0].content | length }}", {}, messages, [(1, True)], budget) == ["4000000"]
    text = render_texts("{% for m in messages %}<{{ m.content }}>{% endfor %}", {}, messages, [(1, True)], budget)[0]
    assert text == f"<{messages[0]['content']}>"
    still_renders()


def test_one_process_serves_a_thousand_renderings() -> None:
    still_renders()
    before = children.n_started
    for i in range(1000):
        assert render("{{ bos_token }}" + str(i % 20)) == f"<s>{i % 20}"
    assert children.n_started == before


def test_a_refused_template_is_refused_again_and_keeps_nothing() -> None:
    for _ in range(2):
        with pytest.raises(TemplateError, match="line 1"):
            render("{% for %}")
    with pytest.raises(TemplateError, match="'x' is undefined"):
        render("{% set ns = namespace(y=1) %}{{ x + 1 }}")
    assert render("{{ x is defined }}{{ ns is defined }}") == "FalseFalse"


def test_threads_render_at_once() -> None:
    texts: dict[int, str] = {}

    def work(i: int) -> None:
        for _ in range(20):
            texts[i] = render(f"{i}{{{{ messages[0].content }}}}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    assert texts == {i: f"{i}Hi" for i in range(8)}
    assert len(children.pids()) <= 2


def test_a_process_that_is_killed_while_it_waits_is_replaced() -> None:
    still_renders()
    before = children.n_started
    for pid in children.pids():
        os.kill(pid, signal.SIGKILL)
    still_renders()
    assert children.n_started == before + 1


def test_ctrl_c_in_a_terminal_does_not_reach_it() -> None:
    """The terminal sends SIGINT to every process of its foreground group."""
    still_renders()
    assert all(os.getpgid(pid) != os.getpgrp() for pid in children.pids())


def test_a_template_that_ends_its_process_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> template_process._Child:
        child = template_process._Child()
        os.kill(child.pid, signal.SIGSEGV)
        return child

    fresh = template_process._Children()
    monkeypatch.setattr(template_process, "children", fresh)
    monkeypatch.setattr(fresh, "_start", dead)
    with pytest.raises(TemplateError, match="ended by SIGSEGV"):
        still_renders()


def test_a_process_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    still_renders()
    stopped = children.pids()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(template_process, "_GUARD_S", 0.1)
        patch.setattr(template_process, "_GUARD_PER_CPU_S", 0.0)
        with pytest.raises(TemplateError, match="does not answer"):
            still_renders()
    assert len(set(stopped) - set(children.pids())) == 1
    for pid in children.pids():
        os.kill(pid, signal.SIGCONT)
    still_renders()


def test_a_process_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(template_process, "children", template_process._Children())
    monkeypatch.setattr(template_process, "_paths", lambda: [str(tmp_path / "nothing.py")])
    with pytest.raises(TemplateError, match=r"status 1: .*nothing.py"):
        still_renders()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_it_inherits_no_files_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.set_inheritable(True)  # as a server that hands its socket to workers has it
        fresh = template_process._Children()
        try:
            assert fresh.ask(
                b'{"source": "x", "variables": {}, "messages": [], "jobs": [[0, true]], "cpu_s": 9, "chars": 9}',
                SMALL,
                1,
            )
            (pid,) = fresh.pids()
            assert sorted(path.name for path in Path(f"/proc/{pid}/fd").iterdir()) == ["0", "1", "2"]
            assert b"SECRET_TOKEN" not in Path(f"/proc/{pid}/environ").read_bytes()
            owner = Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0]
            assert int(owner) == (65534 if os.geteuid() == 0 else os.geteuid())
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert all(
                line.split()[3:5] == ["0", "0"] for line in limits.splitlines() if line.startswith("Max open files")
            )
        finally:
            fresh.end()


def script(body: str) -> subprocess.CompletedProcess[str]:
    head = (
        "import os, signal\n"
        "from quadriga.text.template_process import Budget, children, render_texts\n"
        "budget = Budget(cpu_s=9, memory_bytes=64 << 20, chars=99)\n"
        "def render(text): return render_texts('{{ messages[0] }}', {}, [text], [(1, True)], budget)[0]\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + body], capture_output=True, text=True, timeout=GUARD_S, check=False
    )


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # in a container nobody may collect it
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("end", ["pass", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_it_ends_when_the_program_ends_however_that_happens(end: str) -> None:
    run = script(f"render('x'); print(*children.pids(), flush=True); {end}")
    pid = int(run.stdout)
    assert until(lambda: not runs(pid))


def test_a_fork_of_the_program_has_processes_of_its_own() -> None:
    """Two users of one socket would read each other's answers."""
    run = script(
        "render('x'); before = children.pids()\n"
        "pid = os.fork()\n"
        "mine = str(bool(pid))\n"
        "good = all(render(mine) == mine for _ in range(200))\n"
        "if not pid: os._exit(0 if good and not set(before) & set(children.pids()) else 1)\n"
        "status = os.waitpid(pid, 0)[1]\n"
        "print(good, status, children.pids() == before, render('y'))"
    )
    assert run.stdout.split() == ["True", "0", "True", "y"], run.stderr


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Renderings that go on until the event is set."""
    gate = threading.Event()

    def wait(*_: object) -> list[str]:
        assert gate.wait(GUARD_S)
        return ["late"]

    monkeypatch.setattr(chat, "render_texts", wait)
    yield gate
    gate.set()


def test_renderings_that_take_their_time_hold_up_neither_the_loop_nor_its_threads(held: threading.Event) -> None:
    tokenizer = load_gguf(vocabularies.gguf_bpe())
    assert tokenizer is not None

    async def main() -> None:
        slow = [asyncio.create_task(chat.render_soon(MESSAGES, tokenizer)) for _ in range(64)]
        for _ in range(100):
            await asyncio.wait_for(asyncio.to_thread(int), GUARD_S)
        assert not any(task.done() for task in slow)
        held.set()
        assert [done.text for done in await asyncio.gather(*slow)] == ["late"] * 64

    asyncio.run(main())
