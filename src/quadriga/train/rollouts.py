"""What GRPO learns from: answers that the current model samples, with what they are worth.

    every ``updates`` steps, on all ranks:
        current weights ─► sampler ─► answers to this rank's questions ─► rewards ─► advantages ─► AnswerBatch
    the steps between:  the same answers again, with the probabilities they were sampled with

Every rank has a sampler of its own with a whole copy of the weights, and samples for its own questions. An answer's
seed is a function of the run's seed, the rollout and the question, so any number of ranks samples the same answers, and
a resumed run the ones it would have had: it is saved between rollouts only.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quadriga.model.weight_map import parameter_shapes
from quadriga.nn.linear import Adapted, Quantised, numbers
from quadriga.nn.transformer import Transformer
from quadriga.text.tokenizer import Tokenizer
from quadriga.train.batch import IGNORE, BatchSource, TrainingBatch
from quadriga.train.chat_data import Problem
from quadriga.train.grpo import AnswerBatch, answer_batch
from quadriga.train.held_out import HeldOutReward
from quadriga.train.rewards import Attempt, Reward
from quadriga.train.services import Sampler
from quadriga.train.shards import gathered
from quadriga.train.trainer import Trainer
from quadriga.train.tune_config import GrpoSection
from quadriga.train.world import World


@dataclass(frozen=True)
class Questions:
    """The questions of a run, and what turns answers into text and rewards."""

    problems: Mapping[tuple[int, ...], Problem]
    """By the prompt's token ids."""
    tokenizer: Tokenizer
    reward: Reward
    end_ids: frozenset[int]

    def rewards(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """What each answer to each prompt is worth."""
        attempts = [self._attempt(p, a) for p, group in zip(prompts, answers, strict=True) for a in group]
        worth = iter(self.reward(attempts))
        return [[next(worth) for _ in group] for group in answers]

    def text(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """An answer as text, without the token that ended it."""
        ids = [token for token in answer if self.tokenizer.is_token(token) and token not in self.end_ids]
        return self.tokenizer.decode(ids, after=prompt)

    def _attempt(self, prompt: Sequence[int], answer: Sequence[int]) -> Attempt:
        problem = self.problems[tuple(prompt)]
        return Attempt(
            prompt=self.tokenizer.decode(prompt),
            answer=self.text(prompt, answer),
            wanted=problem.answer,
            row=problem.row,
            finished=bool(answer) and answer[-1] in self.end_ids,
        )


class Rollouts:
    """Turns a step's questions into answers to learn from.

    Args:
        model: the trained module, of whose weights the sampler gets copies.
        section: how answers are sampled.
        seed: the run's.
    """

    def __init__(
        self, model: Transformer, sampler: Sampler, questions: Questions, section: GrpoSection, *, seed: int
    ) -> None:
        self.model, self.sampler, self.questions, self.section, self.seed = model, sampler, questions, section, seed
        self._loaded = False
        self._rollout = -1
        self._batches: list[TrainingBatch] = []

    def __call__(self, step: int, batches: Sequence[TrainingBatch]) -> list[TrainingBatch]:
        """The answers to the questions of a step's micro-batches; all ranks must call this at the same steps."""
        rollout, update = divmod(step, self.section.updates)
        if update == 0:
            self._batches = self._sample(rollout, batches)
            self._rollout = rollout
        assert rollout == self._rollout, "a run is saved and resumed between rollouts"
        return self._batches

    def load(self) -> None:
        """Give the sampler the current weights; all ranks must call this."""
        self.sampler.load(whole_weights(self.model, changed_only=self._loaded))
        self._loaded = True

    def held_out(self, problems: Sequence[Problem], world: World) -> tuple[HeldOutReward, dict[str, str]]:
        """(the mean reward of the most probable answers to questions that are not trained on, two of the answers)."""
        self.load()
        own = problems[world.rank :: world.size]
        prompts = [one.ids for one in own]
        answers = self.sampler.sample(
            prompts, n=1, seeds=[0] * len(own), max_new_tokens=self.section.max_new_tokens, temperature=0.0
        )
        worth = [group[0] for group in self.questions.rewards(prompts, answers)] if own else []
        totals = world.sum(torch.tensor([sum(worth), float(len(worth))], dtype=torch.float64, device=world.device))
        said = {
            self.questions.tokenizer.decode(p): self.questions.text(p, group[0])
            for p, group in list(zip(prompts, answers, strict=True))[:2]
        }
        return HeldOutReward(float(totals[0]) / max(float(totals[1]), 1.0), int(totals[1])), said

    def _sample(self, rollout: int, batches: Sequence[TrainingBatch]) -> list[TrainingBatch]:
        self.load()
        prompts = [prompts_of(batch) for batch in batches]
        flat = [prompt for some in prompts for prompt in some]
        drawn = iter(
            self.sampler.sample(
                flat, n=self.section.samples, seeds=self._seeds(rollout, flat),
                max_new_tokens=self.section.max_new_tokens, temperature=self.section.temperature,
            )
        )  # fmt: skip
        return [self._batch(some, [next(drawn) for _ in some]).to(batches[0].tokens.device) for some in prompts]

    def _seeds(self, rollout: int, prompts: Sequence[Sequence[int]]) -> list[int]:
        texts = [f"{self.seed} {rollout} {tuple(prompt)}" for prompt in prompts]
        return [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little") for text in texts]

    def _batch(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> AnswerBatch:
        documents: list[tuple[Sequence[int], Sequence[int]]] = []
        advantages: list[float] = []
        worth = self.questions.rewards(prompts, answers)
        for prompt, group, rewards in zip(prompts, answers, worth, strict=True):
            documents += [(prompt, answer) for answer in group]
            advantages += advantages_of(rewards)
        if not self.section.kl_weight:
            # Without a KL term an answer of no advantage has no gradient; one stays, so that no rank is without a pass.
            used = [i for i, advantage in enumerate(advantages) if advantage] or [0]
            documents, advantages = [documents[i] for i in used], [advantages[i] for i in used]
        flat = [answer for group in answers for answer in group]
        n = len(flat) / max(len(prompts), 1)
        totals = {
            "reward": torch.tensor(sum(sum(one) / len(one) for one in worth)),
            "answer_tokens": torch.tensor(sum(map(len, flat)) / n),
            "mixed": torch.tensor(float(sum(len(set(one)) > 1 for one in worth))),
        }
        return answer_batch(
            documents, advantages, n_questions=len(prompts), n_samples=self.section.samples, totals=totals
        )


def advantages_of(rewards: Sequence[float]) -> list[float]:
    """(reward - mean) / deviation of a group; exactly 0 where all are equal."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    deviation = (sum((one - mean) ** 2 for one in rewards) / len(rewards)) ** 0.5
    return [(one - mean) / (deviation + 1e-4) for one in rewards]


def prompts_of(batch: TrainingBatch) -> list[list[int]]:
    """The documents of a batch that are no padding."""
    found = []
    for first, last in itertools.pairwise(batch.bounds.tolist()):
        if not bool((batch.targets[first:last] == IGNORE).all()):
            found.append(batch.tokens[first:last].tolist())
    return found


def whole_weights(model: Transformer, *, changed_only: bool = False) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(name, values) of every parameter, gathered over ranks, adapters folded in; all ranks must walk it to its end.

    Args:
        changed_only: leave out what training does not change.
    """
    for name in parameter_shapes(model.config):
        owner, _, part = name.rpartition(".")
        held: Any = getattr(model.get_submodule(owner), part)
        if changed_only and not isinstance(held, Adapted) and not (isinstance(held, Tensor) and held.requires_grad):
            continue
        yield name, _whole(held)


@torch.no_grad()
def _whole(held: Any) -> NDArray[np.float32]:
    match held:
        case Adapted():
            frozen, delta = _whole(held.frozen), held.delta
            a, b = gathered(delta.a).float(), gathered(delta.b).float()
            folded: NDArray[np.float32] = frozen + (delta.scale * (b @ a)).numpy()
            return folded
        case Quantised():
            if isinstance(held.packed, list):
                return np.stack([numbers(one).cpu().numpy() for one in held.packed])
            return numbers(held.one()).cpu().numpy()
    values: NDArray[np.float32] = gathered(held).float().numpy()
    return values


class RolloutTrainer(Trainer):
    """A trainer whose batches are answers to the source's questions."""

    rollouts: Rollouts

    def batches(self, step: int) -> list[TrainingBatch]:
        """See ``Trainer.batches``."""
        return self.rollouts(step, super().batches(step))


class Repeated:
    """A ``BatchSource`` whose every batch is that of ``times`` steps in a row."""

    def __init__(self, source: BatchSource, times: int) -> None:
        self.source, self.times = source, times
        self.domains = source.domains
        self.fingerprint = source.fingerprint

    def n_rows(self, step: int) -> int:
        """See ``BatchSource``."""
        return self.source.n_rows(step // self.times)

    def seq_len(self, step: int) -> int:
        """See ``BatchSource``."""
        return self.source.seq_len(step // self.times)

    def rows(self, step: int, first: int, last: int) -> TrainingBatch:
        """See ``BatchSource``."""
        return self.source.rows(step // self.times, first, last)


def between_rollouts(stop: Callable[[], bool], trainer: Trainer, updates: int) -> Callable[[], bool]:
    """``stop``, asked before a step, heeded only where the step is the last one on its answers."""
    asked = False

    def heeded() -> bool:
        nonlocal asked
        asked = asked or stop()
        return asked and (trainer.step + 1) % updates == 0

    return heeded
