"""Our models inside EleutherAI's harness: the same prompts, the same log-probabilities, the same figures."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.tasks import TaskManager

from quadriga.engine.text_model import TextModel
from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data
from quadriga.evaluate.items import ChoiceItem
from quadriga.evaluate.lm_eval_model import HarnessLM, write_tasks
from quadriga.evaluate.tasks import TASKS
from tests.evaluate.fakes import RuleModel, Said
from tests.paths import data
from tests.server.conftest import tiny_llm


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    names = write_tasks(folder, Data(data("bench")))
    assert len(names) == 61
    return TaskManager(include_path=str(folder), include_defaults=False)


class Call:
    """A request as the harness passes it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def test_requests_and_options_are_passed_on() -> None:
    model = RuleModel(rule=lambda c, k: Said(-float(len(c)), greedy=k == "y"), write=lambda p: p.upper())
    lm = HarnessLM(model)
    assert lm.loglikelihood([Call("ab", "y"), Call("abc", "n")]) == [(-2.0, True), (-3.0, False)]
    assert lm.loglikelihood_rolling([Call("abcd")]) == [-2.0]
    calls = [Call("a", {"until": ["x"]}), Call("b", {"until": "y", "max_gen_toks": 3}), Call("c", {"until": ["x"]})]
    assert lm.generate_until(calls) == ["A", "B", "C"]
    assert model.n_prompts == 3
    with pytest.raises(EvaluationError, match="got top_k"):
        lm.generate_until([Call("a", {"until": [], "top_k": 5})])
    with pytest.raises(EvaluationError, match="chat=True"):
        lm.apply_chat_template([])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs", "shots"),
    [("winogrande", "quadriga_winogrande", 5), ("arc_challenge", "quadriga_arc_challenge", 2)],
)
def test_a_task_of_the_harness_gives_our_figures(manager: TaskManager, ours: str, theirs: str, shots: int) -> None:
    model = TextModel(tiny_llm(n_blocks=80))
    result = lm_eval.simple_evaluate(
        HarnessLM(model), tasks=[theirs], num_fewshot=shots, limit=10, task_manager=manager, bootstrap_iters=0
    )
    items = [i for i in TASKS[ours].items(Data(data("bench")), model, shots)[:10] if isinstance(i, ChoiceItem)]
    graded, at = [], 0
    answers = model.loglikelihoods([pair for item in items for pair in item.pairs])
    samples = sorted(result["samples"][theirs], key=lambda s: s["doc_id"])
    for item, sample in zip(items, samples, strict=True):
        mine = answers[at : at + len(item.pairs)]
        at += len(item.pairs)
        assert [r[0][0] for r in sample["resps"]] == pytest.approx([a.logprob for a in mine], abs=1e-3)
        graded.append(item.grade(mine)["acc"])
    assert result["results"][theirs]["acc,none"] == pytest.approx(sum(graded) / 10)


def test_our_prompts_equal_the_harnesss(manager: TaskManager) -> None:
    bench = Data(data("bench"))
    for ours, theirs, shots in (
        ("winogrande", "quadriga_winogrande", 5),
        ("arc_challenge", "quadriga_arc_challenge", 25),
        ("mmlu", "quadriga_mmlu_abstract_algebra", 5),
    ):
        task = manager.load([theirs])["tasks"][theirs]
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=20)
        asked = [instance.args for instance in task.instances]
        items = TASKS[ours].items(bench, None, shots)[:20]
        assert asked == [pair for item in items if isinstance(item, ChoiceItem) for pair in item.pairs], ours
