"""What ``quadriga tune`` hands to a run: the engine to sample with, a sandbox for programs, judges at an address."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from quadriga.errors import ConfigError

if TYPE_CHECKING:
    from quadriga.evaluate.sandbox import Sandbox
    from quadriga.model.config import ModelConfig
    from quadriga.text.tokenizer import Tokenizer
    from quadriga.train.services import Sampler, SamplerOptions, Services, TopTokens

_MOST_VERDICT_TOKENS = 512


def services(threads: int | None) -> Services:
    """All of them; what a run does not need is never loaded.

    Args:
        threads: of the engine; None: this rank's share of the processors.
    """
    from quadriga.train.services import Services

    def sampler(config: ModelConfig, tokenizer: Tokenizer, options: SamplerOptions) -> Sampler:
        from quadriga.engine.live_sampler import LiveSampler

        return LiveSampler(config, tokenizer, form=options.format, max_len=options.max_len, threads=threads)

    return Services(sampler=sampler, run_programs=_Programs(), judge=_judge, teacher=_teacher)


class _Programs:
    """Runs programs in a sandbox, which is looked for when the first ones come."""

    def __init__(self) -> None:
        self._box: Sandbox | None = None

    def __call__(self, programs: Sequence[str], wall_s: float) -> list[bool]:
        from quadriga.evaluate.sandbox import Sandbox, works

        if self._box is None:
            if not works("bubblewrap") and not works("unshare"):
                raise ConfigError(
                    "rewards of code need a sandbox, and neither bwrap nor unshare works here: install bubblewrap"
                )
            self._box = Sandbox.find()
        return self._box.passes(programs, wall_s=wall_s)


def _teacher(url: str, model: str) -> Callable[[Sequence[Sequence[int]], int], list[TopTokens]]:
    """Asks a completions API for the log-probabilities of echoed prompts."""
    from quadriga.evaluate.endpoints import connect

    endpoint = connect(url, model=model)

    def ask(texts: Sequence[Sequence[int]], top_k: int) -> list[TopTokens]:
        def one(i: int) -> TopTokens:
            body = {"model": model, "prompt": list(texts[i]), "max_tokens": 1, "echo": True, "logprobs": top_k}
            answer = endpoint.client.post("completions", body | {"temperature": 0})
            try:
                top: TopTokens | None = answer["choices"][0]["logprobs"]["top_logprobs"]
            except (KeyError, IndexError, TypeError):
                top = None
            if top is None or len(top) < len(texts[i]):
                raise ConfigError(
                    f"{url} does not tell the log-probabilities of echoed prompts, which distill.url needs"
                )
            return top

        return endpoint.client.map(one, len(texts), lambda n: None)

    return ask


def _judge(url: str, model: str) -> Callable[[Sequence[str]], list[str]]:
    from quadriga.evaluate.endpoints import connect

    endpoint = connect(url, model=model, chat=True)
    return lambda texts: endpoint.generate(texts, max_new_tokens=_MOST_VERDICT_TOKENS)
