"""What is asked of a model and what comes back, as plain values. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from quadriga.engine.dry import MOST_BREAKERS, MOST_BYTES
from quadriga.errors import QuadrigaError, RequestError
from quadriga.model.steering import ExpertFactor

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""stop: an end token or a stop string; length: max_new_tokens or the context is full; cancelled: the caller left;
error: the answer failed on its way (in a :class:`Completion`; no token says so)."""


Routing = tuple[tuple[tuple[int, float], ...], ...]
"""What one position's routers chose: per MoE layer (expert, weight), heaviest first."""


class Constraint(Protocol):
    """A grammar that an answer must follow, fed token by token. Belongs to one request, and one thread at a time.

    One that also has ``ready: bool``, and is not, would keep others waiting in :meth:`allowed`: its answer's next token
    is chosen beside their passes. One that also has ``choose(token_id, left)`` says which token is taken in place of a
    chosen one, where so many may still come, this one included.
    """

    def allowed(self) -> NDArray[np.bool_]:
        """(V,): the tokens that may come next, end tokens included where the answer may end."""
        ...

    def accept(self, token_id: int) -> bool:
        """Go on by a token; True if nothing may follow it."""
        ...


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy and unpenalised: the most probable token every time.

    Order of application: penalties, DRY and bias on the logits, temperature, top-k, typical, top-p, min-p, XTC, one
    draw.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """End tokens are not chosen, and stop strings do not end the answer, before it has so many tokens; except where
    nothing else may follow."""
    temperature: float = 0.0
    """0 is greedy, and so is anything below 1e-5; 1 samples the model's own distribution."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probabilities reach this sum, at least one; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the best one; 0 keeps all."""
    typical_p: float = 1.0
    """Keep the tokens whose information is nearest to the distribution's entropy, until their probabilities reach this
    sum (Meister et al. 2023); 1 keeps all."""
    xtc_probability: float = 0.0
    """How often, for a token, the best choices are excluded; 0 never."""
    xtc_threshold: float = 0.1
    """Which these are: of all tokens at least this probable, after the other cuts, every one but the least probable."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens seen in prompt or answer (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from a logit once per occurrence of its token in the answer."""
    dry_multiplier: float = 0.0
    """What a token loses that would go on with a repetition of ``dry_allowed_length`` tokens; 0: nothing (``dry``)."""
    dry_base: float = 1.75
    """It loses so many times as much for each token more."""
    dry_allowed_length: int = 2
    """Shorter repetitions cost nothing."""
    dry_penalty_last_n: int = -1
    """Repetitions are looked for in so many of the last tokens, of prompt and answer; -1: in all, 0: in none."""
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """Texts that no repetition reaches across, of at most 40 bytes; None or () is none."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """token id -> added to its logit, in [-100, 100]; ids that no token has are refused."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it. One string is one, not its letters; None is none."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer, besides the model's own end tokens."""
    allowed_token_ids: tuple[int, ...] = ()
    """The only tokens that may be chosen, end tokens too; none given: all. Not beside a grammar."""
    bad_words: tuple[str, ...] = ()
    """Texts whose tokens are not chosen one after the other, as they are spelt at the start of a text and after a
    space; other cuts of the same letters into tokens are not looked for. Not beside a grammar."""
    ignore_eos: bool = False
    """Do not end at the model's end tokens (benchmarks)."""
    seed: int | None = None
    """Same seed, same model, same prompt: same answer. None draws a fresh seed."""
    logprobs: int = 0
    """Number of most probable alternatives to report per token, and the chosen token beside them where it is none of
    them; -1, or as many as the vocabulary has, reports all. Its own log-probability is always reported."""
    prompt_logprobs: bool = False
    """Also report the log-probability of every prompt token but the first."""
    speculate: int = 0
    """Guess up to this many tokens a step by looking the last words up in what was said before; 0 guesses none. The
    answer is the same, bit for bit; only the time changes."""

    def __post_init__(self) -> None:
        self._settle()
        _require_int(1, 2**31 - 1, max_new_tokens=self.max_new_tokens)
        _require_int(0, self.max_new_tokens, min_new_tokens=self.min_new_tokens)
        _require_int(0, 2**31 - 1, top_k=self.top_k)
        _require_int(-1, 2**31 - 1, logprobs=self.logprobs)
        _require_int(0, 64, speculate=self.speculate)
        _require_in(0.0, 100.0, temperature=self.temperature)
        _require_in(0.0, 1.0, min_p=self.min_p, xtc_probability=self.xtc_probability, xtc_threshold=self.xtc_threshold)
        _require_in(0.0, 1.0, top_p=self.top_p)
        _require(self.top_p > 0.0, "top_p must be above 0: 0 would keep no token. Use temperature=0 for greedy.")
        _require_in(0.0, 1.0, typical_p=self.typical_p)
        _require(self.typical_p > 0.0, "typical_p must be above 0: 0 would keep no token. 1 keeps all.")
        _require_in(0.01, 100.0, repetition_penalty=self.repetition_penalty)
        _require_in(-100.0, 100.0, presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty)
        _require_in(0.0, 100.0, dry_multiplier=self.dry_multiplier)
        _require_in(1.0, 100.0, dry_base=self.dry_base)
        _require_int(0, 2**31 - 1, dry_allowed_length=self.dry_allowed_length)
        _require_int(-1, 2**31 - 1, dry_penalty_last_n=self.dry_penalty_last_n)
        for token, bias in self.logit_bias.items():
            _require_int(0, 2**31 - 1, **{"logit_bias token id": token})
            _require_in(-100.0, 100.0, **{f"logit_bias[{token}]": bias})
        _require(all(isinstance(s, str) and s for s in self.stop), "stop must be non-empty strings")
        _require(all(isinstance(s, str) and s for s in self.bad_words), "bad_words must be non-empty strings")
        n_breakers = len(self.dry_sequence_breakers)
        _require(n_breakers <= MOST_BREAKERS, f"dry_sequence_breakers are at most {MOST_BREAKERS}, got {n_breakers}")
        for text in self.dry_sequence_breakers:
            good = isinstance(text, str) and 0 < len(text.encode(errors="replace")) <= MOST_BYTES
            _require(good, f"dry_sequence_breakers must be of 1 to {MOST_BYTES} bytes each, got {_shown(text)}")
        for name in ("stop_ids", "allowed_token_ids"):
            for token in getattr(self, name):
                _require_int(0, 2**31 - 1, **{f"{name} entry": token})
        if self.seed is not None:
            _require_int(0, 2**63 - 1, seed=self.seed)

    @property
    def repeats_cost(self) -> bool:
        """True if DRY changes anything."""
        return self.dry_multiplier > 0.0 and self.dry_penalty_last_n != 0

    def _settle(self) -> None:
        """Collections of the caller's become our own: what is in force cannot be changed from outside."""
        for name in ("stop", "bad_words", "dry_sequence_breakers"):
            texts = getattr(self, name)
            texts = (texts,) if isinstance(texts, str) else () if texts is None else texts
            _require(isinstance(texts, (tuple, list)), f"{name} must be strings, got {_shown(texts)}")
            object.__setattr__(self, name, tuple(texts))
        for name in ("stop_ids", "allowed_token_ids"):
            ids = () if getattr(self, name) is None else getattr(self, name)
            _require(isinstance(ids, (tuple, list, set, frozenset)), f"{name} must be token ids, got {_shown(ids)}")
            object.__setattr__(self, name, tuple(ids))
        bias = {} if self.logit_bias is None else self.logit_bias
        _require(isinstance(bias, Mapping), f"logit_bias must be token id -> bias, got {_shown(self.logit_bias)}")
        for name in ("ignore_eos", "prompt_logprobs"):
            given = getattr(self, name)
            _require(isinstance(given, bool), f"{name} must be True or False, got {_shown(given)}")
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(bias)))


def seed_of(seed: int, choice: int) -> int:
    """The seed of one of several answers to a prompt, from 0, which has ``seed`` itself; never a neighbour's seed."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {choice}".encode()).digest()[:8], "little") >> 1


def _require_int(low: int, high: int, **values: object) -> None:
    for name, value in values.items():
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        _require(good, f"{name} must be a whole number from {low} to {high}, got {_shown(value)}")


def _require_in(low: float, high: float, **values: object) -> None:
    for name, value in values.items():
        # Comparing is exact for whole numbers of any size, and false for NaN.
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        _require(good, f"{name} must be from {low:g} to {high:g}, got {_shown(value)}")


def _shown(value: object) -> str:
    try:
        return repr(value)[:80]
    except ValueError:  # Python writes out no whole number of over 4300 digits
        return "a number of thousands of digits"


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """What became of a prompt."""

    n_cached_tokens: int
    """Tokens that were found in the prefix cache."""
    logprobs: tuple[float, ...] = ()
    """Of every token but the first, where ``prompt_logprobs`` was asked for."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    """The most probable tokens at those places, where ``logprobs`` was asked for too."""


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One step of a generation. The last event carries ``finish_reason``; its ``text`` may be empty."""

    token_id: int
    text: str
    """Text that became certain with this token: whole characters only, never part of a stop string."""
    logprob: float
    """Natural-log probability of the token under the model's own distribution (before sampling changes it)."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    prompt: PromptReport | None = None
    """With the first event of an answer."""
    routing: Routing | None = None
    """Which experts computed the prediction of this token, where the request asked for it."""
    router_entropy: tuple[float, ...] = ()
    """With ``routing``, per MoE layer: -sum(p ln p) / ln(E) of the router's softmax, from 0 (sure) to 1 (undecided)."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the engine is asked for."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    params: SamplingParams
    priority: int = 0
    """Higher goes first."""
    routing: bool = False
    """Report which experts each token came from (none in a dense model)."""
    constraint: Constraint | None = None
    """A grammar for the answer."""
    salt: bytes = b""
    """Requests share cached prefixes only with those of the same salt."""
    adapter: str | None = None
    """The adapter that answers, by the name it was added under; None: the model itself."""
    steering: tuple[ExpertFactor, ...] = ()
    """Experts that are switched off or boosted for this request."""
    client: bytes = b""
    """Who asks; clients are served in turn."""
    shown: frozenset[int] = frozenset()
    """Control tokens that are part of the answer's text, by their names."""


@dataclass(frozen=True, kw_only=True)
class Embed:
    """A text that is to become a vector: the mean of its last hidden states after the final norm, of length 1."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    priority: int = 0
    """Higher goes first."""
    client: bytes = b""
    """Who asks; clients are served in turn."""
    adapter: str | None = None
    """The adapter whose states these are; None: the model's own."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What became of an :class:`Embed`."""

    vector: NDArray[np.float32]
    """(D,)."""
    finish_reason: FinishReason = "stop"


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished answer and what it cost."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """Of every token (id, log-probability) of the most probable ones, best first, where ``logprobs`` asked for them."""
    error: QuadrigaError | None = None
    """Why the answer failed, where ``finish_reason`` is "error"; text and tokens are what it had by then."""
    n_prompt_tokens: int
    prompt_logprobs: list[float] = field(default_factory=list)
    """Of every prompt token but the first, where asked for."""
    n_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache."""
    time_to_first_token_s: float
    decode_s: float
    """Seconds from the first token to the last."""

    @property
    def tokens_per_s(self) -> float:
        """Decode rate after the first token; 0 when only one token was made."""
        return (len(self.token_ids) - 1) / self.decode_s if self.decode_s > 0 else 0.0
