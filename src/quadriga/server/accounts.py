"""What each client has used, counted in work: sequences, and tokens.

A sequence is one answer (``n`` of them to each prompt), one text to embed, or a request of any other kind; a line of a
batch is as many as it asks for. What an HTTP request is worth is known once its body has been read, so the door counts
one, and :meth:`Visit.enter` the others.

    sequences a minute    a bucket that holds a minute's worth, and fills at that rate
    tokens a minute       the same, but read and made tokens are taken when they are known, so it may run into debt
    tokens a day          the same again, with a day's worth
    sequences at once     counted up and down

What is computed in the background (lines of batches) counts apart and stands back: a line begins where both kinds
together are within the limit, and half of every bucket is left, while what is asked besides does not count lines under
way. So a client's batches refuse it nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quadriga.server.errors import ApiError

_MINUTE, _DAY = 60.0, 86_400.0


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What a client may use; 0 is no limit."""

    requests_per_minute: int = 0
    """Sequences that begin."""
    tokens_per_minute: int = 0
    """Tokens read and made."""
    tokens_per_day: int = 0
    """The same, in the long run."""
    concurrent: int = 0
    """Sequences at once."""


class _Bucket:
    """Holds at most ``most``, is filled with as many in every ``window_s``."""

    def __init__(self, most: int, now: float, window_s: float = _MINUTE) -> None:
        self.most, self.level, self._at, self._window_s = most, float(most), now, window_s

    def fill(self, now: float) -> None:
        """Up to now."""
        self.level = min(float(self.most), self.level + (now - self._at) * self.most / self._window_s)
        self._at = now

    def wait_s(self, wanted: float, *, behind: bool = False) -> float:
        """Seconds until it holds so much; 0 if it does, or if there is no limit.

        Args:
            behind: it is to hold as much again as its half besides, as far as it can.
        """
        if behind:
            wanted += max(0.0, min(self.most / 2, self.most - wanted))
        return max(0.0, wanted - self.level) * self._window_s / self.most if self.most else 0.0


class Account:
    """One client's.

    Args:
        allowance: what it may use.
        clock: seconds that only go forward.
    """

    def __init__(self, allowance: Allowance, clock: Callable[[], float]) -> None:
        self._allowance, self._clock = allowance, clock
        now = self.seen = clock()
        self._sequences = _Bucket(allowance.requests_per_minute, now)
        self._tokens = _Bucket(allowance.tokens_per_minute, now)
        self._daily = _Bucket(allowance.tokens_per_day, now, _DAY)
        self.open = self.n_behind = self.n_sequences = self.n_tokens = 0
        """Under way; of batches, under way; begun in all; tokens in all."""
        self._freed: list[asyncio.Future[None]] = []

    def check(self, n: int) -> None:
        """Refuse what could never be allowed.

        Raises:
            ApiError: 400: trying again would not help.
        """
        for most, what in ((self._allowance.requests_per_minute, "a minute"), (self._allowance.concurrent, "at once")):
            if most and n > most:
                message = (
                    f"this asks for {n} answers in one request, and a client may have {most} {what}; ask for fewer"
                )
                raise ApiError(400, message, code="request_too_large")

    def take(self, n: int, *, behind: bool = False) -> None:
        """Begin n sequences.

        Args:
            behind: they are of a batch.

        Raises:
            ApiError: 429 with the time to come back.
        """
        allowed = self._allowance
        now = self.seen = self._clock()
        self._sequences.fill(now)
        self._tokens.fill(now)
        self._daily.fill(now)
        if wait := self._sequences.wait_s(n, behind=behind):
            raise self._refusal(f"more than {allowed.requests_per_minute} requests a minute", wait)
        if wait := self._tokens.wait_s(1, behind=behind):
            raise self._refusal(f"more than {allowed.tokens_per_minute} tokens a minute", wait)
        if wait := self._daily.wait_s(1, behind=behind):
            raise self._refusal(f"more than {allowed.tokens_per_day} tokens a day", wait)
        under_way = self.open + (self.n_behind if behind else 0)
        if allowed.concurrent and under_way + n > allowed.concurrent:
            raise self._refusal(f"more than {allowed.concurrent} requests at once", 1)
        self._sequences.level -= n
        self._count(n, behind=behind)
        self.n_sequences += n

    def _count(self, n: int, *, behind: bool) -> None:
        if behind:
            self.n_behind += n
        else:
            self.open += n

    async def take_in_time(self, n: int) -> None:
        """:meth:`take` for a batch: wait for as long as it takes."""
        while True:
            try:
                return self.take(n, behind=True)
            except ApiError as error:
                if error.retry_after_s is None:
                    raise
                freed = asyncio.get_running_loop().create_future()
                self._freed.append(freed)
                # A place that is given back, or the bucket's filling, whichever comes first.
                await asyncio.wait([freed], timeout=error.retry_after_s)

    def give_back(self, n: int, *, behind: bool = False) -> None:
        """n sequences have ended."""
        self._count(-n, behind=behind)
        freed, self._freed = self._freed, []
        for future in freed:
            if not future.done():
                future.set_result(None)

    def spend(self, n_tokens: int) -> None:
        """So many tokens were read or made."""
        self.n_tokens += n_tokens
        for bucket in (self._tokens, self._daily):
            if bucket.most:
                bucket.fill(self._clock())
                bucket.level -= n_tokens

    def idle(self, now: float) -> bool:
        """Nothing is open, and what was used is as good as forgotten."""
        for bucket in (self._tokens, self._daily):
            bucket.fill(now)
        in_debt = any(bucket.level < bucket.most for bucket in (self._tokens, self._daily))
        return not self.open and not self.n_behind and now - self.seen >= _MINUTE and not in_debt

    def report(self) -> dict[str, Any]:
        """What has been used since the server began, what may be, and what is left of it now; null: any number."""
        now, allowed = self._clock(), self._allowance
        limits: dict[str, Any] = {"concurrent": allowed.concurrent or None}
        left: dict[str, Any] = {"concurrent": allowed.concurrent - self.open if allowed.concurrent else None}
        for name, bucket in (
            ("requests_per_minute", self._sequences),
            ("tokens_per_minute", self._tokens),
            ("tokens_per_day", self._daily),
        ):
            bucket.fill(now)
            limits[name], left[name] = bucket.most or None, int(bucket.level) if bucket.most else None
        return {"requests": self.n_sequences, "tokens": self.n_tokens, "limits": limits, "left": left}

    def _refusal(self, message: str, wait_s: float) -> ApiError:
        return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)


class Visit:
    """An HTTP request's part of its client's account: one sequence, which has been taken, from the beginning.

    Args:
        in_background: it is no HTTP request, but lines of a batch, and none has been taken.
    """

    def __init__(self, account: Account, *, in_background: bool = False) -> None:
        self._account, self._behind = account, in_background
        self._spare = self._own = not in_background

    def step_back(self) -> None:
        """The request is a batch, before any of its lines has begun: the one that was taken counts among lines."""
        self._account.give_back(1)
        self._account.n_behind += 1
        self._behind = True

    def end(self) -> None:
        """The HTTP request is over."""
        self._account.give_back(1, behind=self._behind)

    async def enter(self, n: int) -> None:
        """Begin n sequences, of which the visit's own is one if none is under way; lines of a batch wait until they
        are allowed.

        Raises:
            ApiError: 429 with the time to come back, or 400 where no time would be late enough.
        """
        self._account.check(n)
        spare, self._spare = self._spare, False
        try:
            if n > spare and self._behind:
                await self._account.take_in_time(n - spare)
            elif n > spare:
                self._account.take(n - spare)
        except BaseException:
            self._spare = self._spare or spare
            raise

    def leave(self, n: int, n_tokens: int) -> None:
        """n sequences have ended, and so many tokens were read and made for them."""
        self._account.spend(n_tokens)
        self._account.give_back(n - (self._own and not self._spare), behind=self._behind)
        self._spare = self._own
