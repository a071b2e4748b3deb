"""``quadriga chat``: one question on the command line, or a conversation.

:class:`ChatSession` is the conversation itself, without a terminal: lines in, text out through a callback. The loop
around it owns the terminal, the history file and Ctrl-C.
"""

from __future__ import annotations

import difflib
import json as jsonlib
import sys
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quadriga.cli import options
from quadriga.cli.remote import Piece, RemoteModel
from quadriga.errors import InputError, RequestError

if TYPE_CHECKING:
    from quadriga.engine.llm import LLM
    from quadriga.engine.request import SamplingParams, TokenEvent

    Answer = Generator[TokenEvent | Piece, None, None]

HELP = """\
/help                 this list
/system [TEXT]        show or set the system prompt; starts the conversation anew
/set [NAME VALUE]     show or set a sampling parameter, e.g. /set temperature 0.7
/regen                answer the last question again
/undo                 take back the last question and its answer
/clear                forget the conversation, keep the system prompt
/save FILE            write the conversation as JSON
/load FILE            read one back
/stats                speed and length of this conversation
/tokens TEXT          how TEXT is cut into tokens
/experts              which experts each layer used for the last answer
/exit                 leave (also Ctrl-D)
Three quotes (\"\"\") begin and end a message of several lines. Ctrl-C stops an answer."""

LOOPS = "stopped, it goes in circles (--no-loop-guard lets it)"

_COMMANDS = tuple(line.split()[0] for line in HELP.splitlines() if line.startswith("/"))


def chat_command(
    prompt: Annotated[str | None, typer.Argument(help="One question; without it, a conversation begins.")] = None,
    model: options.Model = "smollm2-135m-instruct",
    system: options.System = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    logit_bias: options.LogitBias = None,
    stop: options.Stop = None,
    seed: options.Seed = None,
    json: options.Json = False,
    speculate: options.Speculate = 0,
    loop_guard: Annotated[
        bool, typer.Option("--loop-guard/--no-loop-guard", help="End an answer that goes in circles.")
    ] = True,
    url: Annotated[
        str | None,
        typer.Option(help="Talk to a server with OpenAI's interface instead, e.g. http://127.0.0.1:8000."),
    ] = None,
    api_key: options.APIKey = None,
    api_model: options.APIModel = None,
    format: options.Format = None,
    activations: options.Activations = None,
    kv_format: options.KVFormat = None,
    kv_memory: options.KVMemory = None,
    expert_memory: options.ExpertMemory = None,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    parallel: options.Parallel = None,
) -> None:
    """Talk to a model. The default model (98 MB) is fetched on first use and works offline after that.

    Tokens are drawn as the model's makers suggest (the default model is best greedy), else at temperature 0.7 within
    0.95 of the probability; --temperature 0 is greedy.
    """
    how = options.load_options(
        format=format,
        activations=activations,
        kv_format=kv_format,
        kv_memory=kv_memory,
        expert_memory=expert_memory,
        dtype=dtype,
        device=device,
        threads=threads,
        parallel=parallel,
    )
    options.follow_if_rank(model, how)
    params = options.sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias,
        stop=stop,
        seed=seed,
        speculate=speculate,
    )
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise RequestError("standard input was empty; give a question as an argument, or pipe one in")
    if json and prompt is None:
        raise RequestError("--json answers one question: give it as an argument or on standard input")
    llm: LLM | RemoteModel
    if url is not None:
        llm = RemoteModel(url, api_key, api_model)
    else:
        llm = options.load_model(model, how)
    typed = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = [name for name, value in {**typed, "repetition_penalty": repetition_penalty}.items() if value is not None]
    if temperature is None:
        from quadriga.io.suggested import Suggested

        suggested = Suggested() if isinstance(llm, RemoteModel) else llm.suggested
        params = options.as_suggested(params, suggested, given)
    session = ChatSession(llm, params, system=system, loop_guard=loop_guard)
    if prompt is None:
        _converse(session)
    elif json and url is not None:
        pieces = list(session.ask(prompt))
        print(options.as_json({"text": "".join(p.text for p in pieces), "finish_reason": pieces[-1].finish_reason}))
    elif json:
        done = session.local.chat([*session.opening(), {"role": "user", "content": prompt}], params)
        fields = {"text": done.text, "finish_reason": done.finish_reason, "n_prompt_tokens": done.n_prompt_tokens}
        speed = {"tokens_per_s": done.tokens_per_s, "time_to_first_token_s": done.time_to_first_token_s}
        print(options.as_json({**fields, "token_ids": done.token_ids, **speed}))
    else:
        print_stream(session.ask(prompt), llm)


def print_stream(events: Answer, llm: LLM | RemoteModel) -> None:
    """Print an answer as it comes, then one dim line about it (on stderr, so that pipes get the answer only)."""
    started = first = time.perf_counter()
    n_tokens, reason = 0, "cancelled"
    try:
        for event in events:
            if n_tokens == 0:
                first = time.perf_counter()
            n_tokens += 1
            print(event.text, end="", flush=True)
            reason = event.finish_reason or reason
    except KeyboardInterrupt:
        reason = "cancelled"
    finally:
        events.close()  # now, not when it is collected: the conversation records the answer as far as it came
    print(flush=True)
    elapsed = time.perf_counter() - first
    rate = (n_tokens - 1) / elapsed if n_tokens > 1 and elapsed > 0 else 0.0
    line = options.summary(n_tokens, rate, first - started, reason)
    if llm.expert_store is not None:
        disk = llm.expert_store.stats()
        line += f" · experts: {disk.bytes_read / 1e9:.1f} GB read, {disk.hit_rate:.0%} found in memory"
    print(f"\033[2m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr)


class ChatSession:
    """A conversation with a model: its turns, its settings, and the slash commands over them."""

    def __init__(
        self, llm: LLM | RemoteModel, params: SamplingParams, *, system: str | None = None, loop_guard: bool = True
    ) -> None:
        self.llm, self.loop_guard = llm, loop_guard
        self.params = params
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.answers = 0
        self.answer_tokens = 0
        self.first_s = 0.0
        """Seconds to the first tokens: the prompts."""
        self.later_tokens = 0
        self.later_s = 0.0
        """Seconds of the tokens after the first ones: decoding."""

    @property
    def local(self) -> LLM:
        """The model, where it is in this process.

        Raises:
            RequestError: it is behind an address.
        """
        if isinstance(self.llm, RemoteModel):
            raise RequestError("that needs the model in this process: leave --url out")
        return self.llm

    def opening(self) -> list[dict[str, str]]:
        """The system message, if there is one."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> Answer:
        """Put a question; the turns hold question and answer once the events are through or the caller stops."""
        self.turns.append({"role": "user", "content": text})
        return self._answer()

    def _answer(self) -> Answer:
        try:
            events = self.llm.chat_stream([*self.opening(), *self.turns], self.params)
        except InputError:
            self.turns.pop()  # a question that cannot be asked is not part of the conversation
            raise
        return self._record(events)

    def _record(self, events: Iterable[TokenEvent | Piece]) -> Answer:
        from quadriga.engine.loop_guard import LoopGuard

        text, started, guard, n = "", time.perf_counter(), LoopGuard(), 0
        first = started
        try:
            for event in events:
                if n == 0:
                    first = time.perf_counter()
                text += event.text
                n += 1
                yield event
                # Of a model elsewhere, pieces of text stand for tokens.
                token = hash(event.text) if isinstance(event, Piece) else event.token_id
                if self.loop_guard and event.finish_reason is None and guard.push(token):
                    yield Piece("", LOOPS)
                    break
        finally:  # also when Ctrl-C closes this generator: what was said was said
            self.turns.append({"role": "assistant", "content": text})
            self.answers += 1
            self.answer_tokens += n
            self.first_s += first - started
            self.later_tokens += max(0, n - 1)
            self.later_s += time.perf_counter() - first if n else 0.0

    def command(self, line: str, say: Callable[[str], None]) -> Answer | None:
        """Carry out a slash command. Returns events where the command makes the model answer.

        Raises:
            EOFError: /exit.
            InputError: what is wrong with the command, for the user.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/help" | "/?":
                say(HELP)
            case "/exit" | "/quit" | "/bye":
                raise EOFError
            case "/system":
                self._system(rest, say)
            case "/set":
                self._set(rest, say)
            case "/regen":
                self._require_answer("regenerate")
                self.turns.pop()
                return self._answer()
            case "/undo":
                self._require_answer("take back")
                del self.turns[-2:]
                say("taken back")
            case "/clear":
                self.turns.clear()
                say("forgotten")
            case "/save":
                self._save(rest, say)
            case "/load":
                self._load(rest, say)
            case "/stats":
                rate = self.later_tokens / self.later_s if self.later_s else 0.0
                say(
                    f"{self.answers} answers, {self.answer_tokens} tokens: {self.first_s:.1f} s to the first ones, "
                    f"then {rate:.1f} tok/s"
                )
                if not isinstance(self.llm, RemoteModel):
                    used = len(self.llm.chat_ids([*self.opening(), *self.turns])) if self.turns else 0
                    say(f"context: {used} of {self.llm.config.max_seq_len} tokens")
            case "/tokens":
                self._tokens(rest, say)
            case "/experts":
                self._experts(say)
            case _:
                near = difflib.get_close_matches(name, _COMMANDS, n=1)
                raise RequestError(f"there is no {name}." + (f" Did you mean {near[0]}?" if near else " Try /help."))
        return None

    def _require_answer(self, what: str) -> None:
        if len(self.turns) < 2:
            raise RequestError(f"there is no answer yet to {what}")

    def _system(self, text: str, say: Callable[[str], None]) -> None:
        if not text:
            say(self.system if self.system is not None else "no system prompt of yours; the template may bring its own")
            return
        self.system = text
        self.turns.clear()
        say("set; the conversation starts anew")

    def _set(self, rest: str, say: Callable[[str], None]) -> None:
        settable = ["temperature", "top_k", "top_p", "min_p", "max_new_tokens", "seed", "repetition_penalty"]
        settable += ["presence_penalty", "frequency_penalty"]
        name, _, value = rest.partition(" ")
        if not name:
            say("\n".join(f"{key} = {getattr(self.params, key)}" for key in settable))
            return
        if name not in settable:
            near = difflib.get_close_matches(name, settable, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(settable)}."
            raise RequestError(f"there is no parameter {name}.{hint}")
        whole = name in ("top_k", "max_new_tokens", "seed")
        try:
            number: Any = None if name == "seed" and value == "none" else int(value) if whole else float(value)
        except ValueError:
            raise RequestError(f"{name} takes a {'whole ' if whole else ''}number, got {value!r}") from None
        self.params = replace(self.params, **{name: number})
        say(f"{name} = {number}")

    def _save(self, file: str, say: Callable[[str], None]) -> None:
        path = _file_argument(file, "/save")
        try:
            path.write_text(jsonlib.dumps([*self.opening(), *self.turns], ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise RequestError(f"cannot write {path}: {error.strerror}") from None
        say(f"saved {len(self.turns)} turns to {path}")

    def _load(self, file: str, say: Callable[[str], None]) -> None:
        path = _file_argument(file, "/load")
        try:
            messages = jsonlib.loads(path.read_text())
        except OSError as error:
            raise RequestError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise RequestError(f"{path} is not JSON: {error}") from None
        shaped = isinstance(messages, list) and all(
            isinstance(m, dict)
            and m.get("role") in ("system", "user", "assistant")
            and isinstance(m.get("content"), str)
            for m in messages
        )
        if not shaped:
            raise RequestError(f"{path} must be a JSON list of messages with a role and a content")
        opening = [m for m in messages[:1] if m["role"] == "system"]
        self.system = opening[0]["content"] if opening else None
        self.turns = [{"role": m["role"], "content": m["content"]} for m in messages[len(opening) :]]
        say(f"loaded {len(self.turns)} turns")

    def _tokens(self, text: str, say: Callable[[str], None]) -> None:
        tokenizer = self.local.tokenizer
        if not text or tokenizer is None:
            raise RequestError("give a text: /tokens TEXT")
        ids = tokenizer.encode(text)
        say(f"{len(ids)} tokens: " + " ".join(f"{i}:{tokenizer.token_text(i)!r}" for i in ids))

    def _experts(self, say: Callable[[str], None]) -> None:
        mixtures = self.local.config.moe_layers
        if not mixtures:
            say("this is a dense model: every token uses the whole feed-forward network, there are no experts")
            return
        self._require_answer("look into")
        prompt = self.local.chat_ids([*self.opening(), *self.turns[:-1]])
        tokenizer = self.local.tokenizer
        assert tokenizer is not None, "a chat has a tokenizer"
        ids = [*prompt, *tokenizer.encode_continuation(self.turns[-1]["content"])]
        most = max(spec.n_experts for _, spec in mixtures)
        say(f"share of the answer's tokens by layer (rows) and expert (columns 0..{most - 1}), in %")
        for (layer, spec), stats in zip(mixtures, self.local.routing(ids), strict=True):
            answered = stats.expert_ids[len(prompt) :].reshape(-1)
            load = [int((answered == expert).sum()) for expert in range(spec.n_experts)]
            share = [round(100 * spec.top_k * n / max(1, answered.size)) for n in load]
            say(f"{layer:3d} " + " ".join(f"{n:3d}" for n in share))


def _file_argument(text: str, command: str) -> Path:
    if not text:
        raise RequestError(f"give a file: {command} FILE")
    return Path(text).expanduser()


# The terminal --------------------------------------------------------------------------------------------------------


def _converse(session: ChatSession) -> None:
    """The loop of a conversation on a terminal."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    from quadriga import runtime

    runtime.cache_dir().mkdir(parents=True, exist_ok=True)
    reader: PromptSession[str] = PromptSession(
        history=FileHistory(str(runtime.cache_dir() / "chat_history")),
        completer=WordCompleter(list(_COMMANDS), sentence=True),
        complete_while_typing=False,
    )
    print(f"{session.llm.name}. /help lists commands, Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            line = _read_message(reader.prompt)
            if not line.strip():
                continue
            events = session.command(line, print) if line.startswith("/") else session.ask(line)
            if events is not None:
                print_stream(events, session.llm)
        except KeyboardInterrupt:
            continue  # Ctrl-C at the prompt drops the line
        except EOFError:
            return
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def _read_message(prompt: Callable[[str], str]) -> str:
    line = prompt("> ")
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].endswith('"""'):
        lines.append(prompt(". "))
    return "\n".join(lines).removesuffix('"""')
