"""The chat command: the conversation and its slash commands on a fake model, and the terminal in a real one."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from quadriga.cli.chat import ChatSession, print_stream
from quadriga.engine.request import SamplingParams, TokenEvent
from quadriga.errors import InputError, RequestError, TemplateError
from tests.checkpoint.models import TINY, write_hf
from tests.waiting import HANG_S


class FakeLLM:
    """Answers every conversation with how many messages it saw, a word at a time."""

    name = "fake"
    config = TINY["llama2"]
    tokenizer = None
    expert_store = None

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []

    def chat_stream(self, messages: Sequence[dict[str, str]], params: SamplingParams) -> Iterator[TokenEvent]:
        self.asked.append([dict(m) for m in messages])
        if messages[-1]["content"] == "bad":
            raise TemplateError("cannot render")
        words = ["I ", "saw ", str(len(messages))]
        return iter(
            TokenEvent(token_id=i, text=w, logprob=-1.0, finish_reason="stop" if i == 2 else None)
            for i, w in enumerate(words)
        )

    def chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [0] * (3 * len(messages))


@pytest.fixture
def session() -> ChatSession:
    return ChatSession(FakeLLM(), SamplingParams())  # type: ignore[arg-type]


def say(session: ChatSession, line: str) -> str:
    """Run a line as the terminal loop would; everything shown, as one text."""
    shown: list[str] = []
    events = session.command(line, shown.append) if line.startswith("/") else session.ask(line)
    if events is not None:
        shown.append("".join(e.text for e in events))
    return "\n".join(shown)


def test_a_conversation_grows_and_can_be_taken_back(session: ChatSession) -> None:
    assert say(session, "hello") == "I saw 1"
    assert say(session, "again") == "I saw 3"
    assert say(session, "/regen") == "I saw 3"
    assert [m["content"] for m in session.turns] == ["hello", "I saw 1", "again", "I saw 3"]
    say(session, "/undo")
    assert [m["content"] for m in session.turns] == ["hello", "I saw 1"]
    say(session, "/clear")
    assert session.turns == []


def test_the_system_prompt_comes_first_and_starts_anew(session: ChatSession) -> None:
    say(session, "hello")
    say(session, "/system Be brief.")
    assert say(session, "hi") == "I saw 2"
    assert session.llm.asked[-1][0] == {"role": "system", "content": "Be brief."}  # type: ignore[attr-defined]
    assert say(session, "/system") == "Be brief."


def test_settings_are_checked_as_everywhere(session: ChatSession) -> None:
    assert say(session, "/set temperature 0.7") == "temperature = 0.7"
    assert session.params.temperature == 0.7
    assert "temperature = 0.7" in say(session, "/set")
    for line, says in (
        ("/set temperature -1", "temperature must be from 0"),
        ("/set temperature warm", "takes a number, got 'warm'"),
        ("/set top_k 1.5", "takes a whole number"),
        ("/set temprature 1", "Did you mean temperature"),
        ("/set colour 1", "There are: temperature"),
    ):
        with pytest.raises(RequestError, match=says):
            say(session, line)
    assert session.params.temperature == 0.7
    say(session, "/set seed 5")
    assert session.params.seed == 5
    say(session, "/set seed none")
    assert session.params.seed is None


def test_a_question_that_cannot_be_asked_is_not_kept(session: ChatSession) -> None:
    with pytest.raises(InputError):
        session.ask("bad")
    assert session.turns == []


def test_an_interrupted_answer_is_kept_as_far_as_it_came(session: ChatSession) -> None:
    events = session.ask("hello")
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert session.turns[-1] == {"role": "assistant", "content": "I "}


def test_saved_conversations_come_back(session: ChatSession, tmp_path: Path) -> None:
    say(session, "/system Be brief.")
    say(session, "hello")
    file = tmp_path / "chat.json"
    say(session, f"/save {file}")
    other = ChatSession(FakeLLM(), SamplingParams())  # type: ignore[arg-type]
    say(other, f"/load {file}")
    assert (other.system, other.turns) == (session.system, session.turns)
    for content, says in (("{", "not JSON"), ("{}", "list of messages"), ('[{"role": "root"}]', "list of messages")):
        file.write_text(content)
        with pytest.raises(RequestError, match=says):
            say(other, f"/load {file}")
    with pytest.raises(RequestError, match="cannot read"):
        say(other, f"/load {tmp_path / 'missing'}")
    with pytest.raises(RequestError, match="cannot write"):
        say(other, f"/save {tmp_path / 'no' / 'folder'}")
    with pytest.raises(RequestError, match="give a file"):
        say(other, "/save")


def test_the_other_commands(session: ChatSession) -> None:
    assert "/regen" in say(session, "/help")
    for line in ("/regen", "/undo"):
        with pytest.raises(RequestError, match="no answer yet"):
            say(session, line)
    say(session, "hello")
    assert "1 answers, 3 tokens" in say(session, "/stats")
    assert "context: 6 of 64" in say(session, "/stats")
    assert "dense model" in say(session, "/experts")
    with pytest.raises(RequestError, match="Did you mean /regen"):
        say(session, "/regn")
    with pytest.raises(EOFError):
        say(session, "/exit")


def test_experts_of_the_last_answer() -> None:
    from quadriga import LLM
    from quadriga.nn.transformer import Transformer, random_parameters
    from quadriga.runners.torch import TorchRunner
    from quadriga.text.tokenizer import Tokenizer
    from tests.engine.test_llm import Letters

    config = TINY["dbrx"]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    llm = LLM(
        TorchRunner(Transformer.from_parameters(config, random_parameters(config, std=0.4))),
        Tokenizer(Letters(), special_ids={}, chat_template=template),
    )
    session = ChatSession(llm, SamplingParams(max_new_tokens=6, ignore_eos=True))
    say(session, "hello")
    shown = say(session, "/experts").splitlines()
    assert len(shown) == 1 + config.n_layers
    for row in shown[1:]:
        # Each token visits three experts, so a row adds up to 300 %, but for rounding.
        assert sum(int(n) for n in row.split()[1:]) == pytest.approx(300, abs=3)


def test_the_last_line_tells_what_it_took(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    print_stream(session.ask("hello"), session.llm)
    shown = capsys.readouterr()
    assert shown.out == "I saw 1\n"
    assert shown.err.startswith("3 tokens · ")
    assert shown.err.rstrip().endswith("s · stop")


PROMPT = "\x1b[?2004h"
"""What the terminal gets when the prompt is ready for keys: a request for bracketed paste."""

# In a process of its own -----------------------------------------------------------------------------------------------


def quadriga(*arguments: str, stdin: str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quadriga", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL if stdin is None else None,
        **options,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["info", "dbrx-132"], 2, "error: no preset is called 'dbrx-132'. Did you mean 'dbrx-132b'?"),
        (["chat", "hi", "--model", "/no/such/file"], 2, "error: there is no file, folder or catalogue model"),
        (["chat", "hi", "--temperature", "-1"], 2, "error: temperature must be from 0 to 100"),
        (["chat"], 2, "error: standard input was empty"),
        (["generate", "x", "--logit-bias", "abc"], 2, "error: --logit-bias takes TOKEN_ID=BIAS"),
        (["convert", "/no/such/file", "out"], 2, "error: there is no file"),
        (["pull", "https://example.org/x"], 2, "error: models are not downloaded from addresses"),
        (["models", "show", "nonsense"], 2, "error: 'nonsense' is neither"),
        (["chta"], 2, "No such command 'chta'"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    run = quadriga(*arguments, cwd=tmp_path)
    assert run.returncode == code, run.stderr
    assert says in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "tokenizer", "pickle"])
def test_hostile_files_end_in_one_line_and_code_2(tmp_path: Path, kind: str) -> None:
    """What the readers refuse reaches the user as one line, through every command that opens files."""
    path = tmp_path / "model"
    match kind:
        case "gguf":
            path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (2**40).to_bytes(8, "little") * 2)
        case "safetensors":
            write_hf(path, TINY["dbrx"])
            (path / "model.safetensors").write_bytes((2**63).to_bytes(8, "little"))
        case "tokenizer":
            write_hf(path, TINY["dbrx"])
            (path / "tokenizer.json").write_text("[" * 100_000)
        case "pickle":
            write_hf(path, TINY["dbrx"])
            (path / "model.safetensors").rename(path / "pytorch_model.bin")
    run = quadriga("generate", "x", "--model", str(path))
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr


def test_debug_shows_the_traceback() -> None:
    run = quadriga("--debug", "info", "dbrx-132")
    assert run.returncode == 1
    assert "Traceback" in run.stderr


def test_version_and_json() -> None:
    assert quadriga("--version").stdout.startswith("quadriga 0.")
    facts = json.loads(quadriga("info", "dbrx-132b", "--json").stdout)
    assert facts["parameters"]["total"] == 131_596_523_520


def test_a_reader_that_leaves_is_no_error() -> None:
    run = subprocess.run(
        f"{sys.executable} -m quadriga info dbrx-132b --json | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "{\n"
    assert run.stderr == ""


@pytest.mark.weights
def test_questions_by_argument_pipe_and_json(smollm2: Path) -> None:
    question = "What is the capital of France?"
    greedy = ("--temperature", "0")
    asked = quadriga("chat", question, "--model", str(smollm2), *greedy)
    assert asked.returncode == 0, asked.stderr
    assert "Paris" in asked.stdout
    assert " tok/s · first token " in asked.stderr
    piped = quadriga("chat", "--model", str(smollm2), "--json", *greedy, stdin=question)
    assert json.loads(piped.stdout)["text"] == asked.stdout.strip()
    made = json.loads(
        quadriga("generate", "The capital of France is", "--model", str(smollm2), "--max-tokens", "2", "--json").stdout
    )
    assert made["text"].startswith(" Paris")
    assert made["finish_reason"] == "length"


@pytest.mark.weights
def test_a_conversation_on_a_terminal(smollm2: Path, tmp_path: Path) -> None:
    """A real terminal: a question, Ctrl-C during a long answer, a command, Ctrl-D."""

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background of a shell inherit that it is ignored

    terminal, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "QUADRIGA_CACHE": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "quadriga", "chat", "--model", str(smollm2), "--temperature", "0"],
        stdin=side,
        stdout=side,
        stderr=side,
        env=environment,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(side)
    seen = ""

    def until(*words: str, longer_than: int = 0) -> None:
        nonlocal seen
        in_this_order = re.compile(".*".join(map(re.escape, words)), re.DOTALL)
        while len(seen) <= longer_than or not in_this_order.search(seen):
            assert select.select([terminal], [], [], HANG_S)[0], seen
            text = os.read(terminal, 65536).decode(errors="replace")
            seen += text
            if "\x1b[6n" in text:  # prompt_toolkit asks where the cursor is
                os.write(terminal, b"\x1b[1;1R")

    def type_line(text: str) -> None:
        nonlocal seen
        seen = ""
        os.write(terminal, text.encode() + b"\r")

    try:
        until("/help lists commands")
        until(PROMPT)
        type_line("What is the capital of France?")
        until("Paris", "tok/s", PROMPT)
        type_line("/clear")
        until("forgotten", PROMPT)
        type_line("Write a long story about a fox.")
        until("\x1b[?2004l")  # the prompt is done; what follows is the answer
        before = len(seen)
        # So much is prose: the prompt's last codes are fewer, and while it lives Ctrl-C is a key like others.
        until(longer_than=before + 500)
        os.write(terminal, b"\x03")
        until("cancelled", PROMPT)
        type_line("/stats")
        until("2 answers", PROMPT)
        os.write(terminal, b"\x04")
        assert process.wait(HANG_S) == 0
        assert (tmp_path / "chat_history").exists()
    finally:
        process.kill()
        os.close(terminal)
