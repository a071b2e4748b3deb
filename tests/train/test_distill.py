"""Distillation compared with naive sums over the vocabulary; a student that learns its teacher's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.nn.context import PackedContext
from quadriga.nn.transformer import random_parameters
from quadriga.train.batch import IGNORE, TrainingBatch
from quadriga.train.config import parse_toml
from quadriga.train.distill import Distillation, FinalHidden, ServedDistillation, TaughtSource, Teacher
from quadriga.train.metrics import read
from quadriga.train.parallel import ModelWithLoss
from quadriga.train.tune import tune
from quadriga.train.tune_config import TuneConfig
from tests.checkpoint.models import TINY, write_hf
from tests.nn.test_lora import model_of
from tests.text.vocabularies import write_bpe
from tests.train.test_objectives import adapted, gradients, pair_batch
from tests.train.tune_runs import LORA, settings, toml, write_base

N_VOCAB = 90
"""Of the heads' 97 rows."""


def logits(model: torch.nn.Module, ids: list[int]) -> Tensor:
    made: Tensor = model(torch.tensor(ids), PackedContext([len(ids)])).logits
    return made[:, :N_VOCAB]


@pytest.mark.parametrize(
    ("top_k", "temperature", "weight"), [(0, 1.0, 1.0), (0, 1.7, 0.6), (5, 1.0, 1.0), (3, 0.8, 0.3)]
)
def test_loss_and_gradient_are_those_of_the_formula(top_k: int, temperature: float, weight: float) -> None:
    batch, documents = pair_batch()
    documents = [([token % N_VOCAB for token in ids], prompt) for ids, prompt in documents]
    batch = replace(
        batch,
        tokens=batch.tokens % N_VOCAB,
        targets=torch.where(batch.targets < 0, batch.targets, batch.targets % N_VOCAB),
    )
    student, taught = adapted(), model_of("olmoe")
    teacher = Teacher(ModelWithLoss(taught, FinalHidden()).eval())
    objective = Distillation(teacher, N_VOCAB, top_k=top_k, temperature=temperature, weight=weight)
    loss, metrics = objective(student, batch)
    loss.backward()
    got = [g.clone() for g in gradients(student)]
    student.zero_grad()
    kl = nll = torch.zeros((), dtype=torch.float64)
    for ids, prompt in documents:
        ours, theirs = logits(student, ids), logits(taught, ids).detach()
        for n in range(prompt - 1, len(ids) - 1):
            p, q = (theirs[n] / temperature).softmax(-1), (ours[n] / temperature).softmax(-1)
            if top_k:
                best = p.argsort(descending=True)[:top_k]
                p, q = (torch.cat([one[best], 1 - one[best].sum()[None]]) for one in (p, q))
            kl = kl + temperature**2 * (p * torch.log(p / q)).sum()
            nll = nll - ours[n].log_softmax(-1)[ids[n + 1]]
    wanted = weight * kl + (1 - weight) * nll
    torch.testing.assert_close(loss, wanted, rtol=1e-7, atol=0)
    assert float(metrics["kl"]) == pytest.approx(float(kl.detach()), rel=1e-7)
    assert float(metrics["nll"]) == pytest.approx(float(nll.detach()), rel=1e-7)
    wanted.backward()
    for mine, theirs in zip(got, gradients(student), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-10)
    assert all(p.grad is None for p in taught.parameters())


def test_top_k_is_a_lower_bound_and_the_whole_vocabulary_its_limit() -> None:
    generator = torch.Generator().manual_seed(2)
    p, q = (3 * torch.randn(7, 41, generator=generator, dtype=torch.float64) for _ in range(2))

    def kl(top_k: int) -> Tensor:
        teacher = Teacher(ModelWithLoss(model_of("olmoe"), FinalHidden()))
        return Distillation(teacher, 41, top_k=top_k, temperature=1.3, weight=1.0).divergence(p, q)

    whole = kl(0)
    assert (kl(1) < kl(4)).all() and (kl(4) < kl(16)).all() and (kl(16) < whole).all() and (kl(1) > 0).all()
    torch.testing.assert_close(kl(40), whole, rtol=1e-4, atol=1e-6)


class Words:
    """A tokenizer whose token i is the text <i>; two of them have one text, and one has none."""

    n_vocab = N_VOCAB

    @property
    def special_ids(self) -> dict[str, int]:
        return {"<2>": 2}

    def token_bytes(self, token: int) -> bytes:
        return b"\xff" if token == 30 else b"<40>" if token == 41 else f"<{token}>".encode()


def test_a_served_teacher_tells_its_top_k_as_texts() -> None:
    """What it says is the local teacher's top k; a token whose text is not its own counts among the others."""
    batch, documents = pair_batch()
    batch = replace(
        batch,
        tokens=batch.tokens % N_VOCAB,
        targets=torch.where(batch.targets < 0, batch.targets, batch.targets % N_VOCAB),
    )
    taught, asked = model_of("olmoe"), []

    class Source:
        domains, fingerprint = ("chosen", "rejected"), "same"

        def rows(self, step: int, first: int, last: int) -> TrainingBatch:
            assert (step, first, last) == (3, 0, 1)
            return batch

    def ask(texts: Sequence[Sequence[int]], top_k: int) -> list[list[dict[str, float] | None]]:
        asked.extend(list(ids) for ids in texts)
        found: list[list[dict[str, float] | None]] = []
        for ids in texts:
            logps = logits(taught, list(ids)).detach().log_softmax(-1)
            tops = [one.topk(top_k) for one in logps[:-1]]
            found.append([None, *({f"<{i}>": float(v) for v, i in zip(*top, strict=True)} for top in tops)])
        return found

    source = TaughtSource(Source(), ask, Words(), 6)  # type: ignore[arg-type]
    rows = source.rows(3, 0, 1)
    assert asked == [[token % N_VOCAB for token in ids] for ids, _ in documents]
    assert not {30, 40, 41} & set(rows.ids.flatten().tolist())
    student = adapted()
    loss, _ = ServedDistillation(N_VOCAB, weight=0.7)(student, rows)
    loss.backward()
    got = [g.clone() for g in gradients(student)]
    student.zero_grad()
    kl = nll = torch.zeros((), dtype=torch.float64)
    for ids, prompt in documents:
        ids = [token % N_VOCAB for token in ids]
        ours, theirs = logits(student, ids), logits(taught, ids).detach()
        for n in range(prompt - 1, len(ids) - 1):
            p, q = theirs[n].softmax(-1), ours[n].softmax(-1)
            best = [i for i in p.argsort(descending=True)[:6].tolist() if i not in (30, 40, 41)]
            p, q = (torch.cat([one[best], 1 - one[best].sum()[None]]) for one in (p, q))
            kl = kl + (p * torch.log(p / q)).sum()
            nll = nll - ours[n].log_softmax(-1)[ids[n + 1]]
    wanted = 0.7 * kl + 0.3 * nll
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)  # what is told is float32
    wanted.backward()
    for mine, theirs in zip(got, gradients(student), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_what_a_served_teacher_says_stands_where_it_was_said() -> None:
    """The target after a text's last token is asked for; its most probable come first; texts of two tokens are left out."""
    batch = TrainingBatch(
        tokens=torch.tensor([5, 6, 7, 8, 9, 1, 3, 4]),
        targets=torch.tensor([IGNORE, 7, 11, 9, IGNORE, IGNORE, IGNORE, 13]),
        positions=torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]),
        bounds=torch.tensor([0, 3, 6, 8], dtype=torch.int32),
        domains=torch.tensor([0, 1, 0], dtype=torch.int16),
    )
    asked: list[list[int]] = []

    class Source:
        domains, fingerprint = ("a", "b"), "same"

        def rows(self, step: int, first: int, last: int) -> TrainingBatch:
            return batch

    def ask(texts: Sequence[Sequence[int]], top_k: int) -> list[list[dict[str, float] | None]]:
        assert top_k == 2
        asked.extend(list(ids) for ids in texts)
        return [
            [None, *({"<40>": -0.5, f"<{t}>": -3.0, f"<{t + 1}>": -1.0, f"<{t + 2}>": -2.0} for t in ids[1:])]
            for ids in texts
        ]

    made = TaughtSource(Source(), ask, Words(), 2).rows(0, 0, 1)  # type: ignore[arg-type]
    assert asked == [[5, 6, 7, 11], [8, 9, 1], [3, 4, 13]]
    nothing = [-1, -1]
    assert made.ids.tolist() == [[7, 8], [8, 9], [12, 13], [10, 11], [2, 3], nothing, [5, 6], [14, 15]]
    assert made.logps.tolist() == [[-1.0, -2.0] if row != nothing else [0.0, 0.0] for row in made.ids.tolist()]


def test_a_student_learns_its_teachers_answers(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    taught = tune(settings(tmp_path, base, "sft", run="teacher"))
    section = f'[distill]\nteacher = "{taught.result}"\ntop_k = 8\n'
    outcome = tune(settings(tmp_path, base, "distill", LORA + section, run="student"))
    assert outcome.done and outcome.result == tmp_path / "student" / "adapter"
    lines = read(tmp_path / "student" / "metrics.jsonl")
    losses = [line["held_out"]["held out"]["loss"] for line in lines if "held_out" in line]
    assert losses[1] < 0.85 * losses[0]
    assert all(line["kl"] == line["loss"] for line in lines if "kl" in line)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    config = replace(TINY["mixtral"], vocab_size=448, max_seq_len=96, eos_ids=(2,))
    write_hf(tmp_path / "other", config, parameters=random_parameters(config, std=0.05))
    write_bpe(tmp_path / "other", eos_token="<|im_end|>")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|began|>"))
    with pytest.raises(ConfigError, match="must have the vocabulary of the model"):
        tune(settings(tmp_path, base, "distill", f'[distill]\nteacher = "{tmp_path / "other"}"\n'))
    with pytest.raises(ConfigError, match=r"distill.url needs top_k from 1 to 20"):
        settings(tmp_path, base, "distill", '[distill]\nteacher = "m"\nurl = "http://x/v1"\n')
    with pytest.raises(ConfigError, match=r"distill.url needs a client"):
        tune(settings(tmp_path, base, "distill", '[distill]\nteacher = "m"\nurl = "http://x/v1"\ntop_k = 5\n'))
    with pytest.raises(ConfigError, match=r"distill.teacher is given with objective 'distill'"):
        parse_toml(toml(tmp_path, base, "distill").encode(), TuneConfig)
