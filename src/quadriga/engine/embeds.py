"""Texts that are to become vectors, on their way through passes beside the answers."""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.engine.pooling import Pooling
from quadriga.engine.request import Embedding
from quadriga.engine.sampler import require_finite
from quadriga.engine.sequences import PassPlan, Running
from quadriga.errors import RequestError
from quadriga.runners.base import Floats


@dataclass(eq=False)
class _Text:
    running: Running
    pooling: Pooling


class Embeds:
    """The texts in the engine, by request id.

    Args:
        d_model: numbers of a state, and of a vector.
    """

    def __init__(self, d_model: int) -> None:
        self._d_model = d_model
        self._texts: dict[int, _Text] = {}

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._texts

    def add(self, running: Running) -> None:
        """A text that has come."""
        self._texts[running.request_id] = _Text(running, Pooling(self._d_model))

    def running(self) -> list[Running]:
        """Their sequences."""
        return [text.running for text in self._texts.values()]

    def take(self, plan: PassPlan, states: Floats) -> list[tuple[int, Embedding | RequestError]]:
        """Take the texts' part of a pass's states (n_tokens, D): the vectors of those whose last position it has.

        A vector that is not finite is the error that its request ends with.
        """
        done: list[tuple[int, Embedding | RequestError]] = []
        at = 0
        for chunk in plan.chunks:
            n, sequence = len(chunk.tokens), chunk.sequence
            at += n
            text = self._texts.get(sequence.request_id)
            if text is None:
                continue
            text.pooling.add(chunk.start, states[at - n : at])
            if chunk.start + n == len(sequence.tokens):
                done.append((sequence.request_id, _vector(text.pooling)))
        return done

    def drop(self, request_id: int) -> bool:
        """Forget a text; False if it is not here."""
        return self._texts.pop(request_id, None) is not None


def _vector(pooling: Pooling) -> Embedding | RequestError:
    vector = pooling.vector()
    try:
        require_finite([float(vector.sum())])
    except RequestError as error:
        return error
    return Embedding(vector=vector)
