"""Our models in EleutherAI's harness: an ``LM`` class, and its tasks over local files. Needs the extra ``eval``.

    lm = HarnessLM(TextModel(quadriga.load("smollm2-135m-instruct")))
    write_tasks(folder)
    lm_eval.simple_evaluate(lm, tasks=["quadriga_hellaswag"],
                            task_manager=TaskManager(include_path=str(folder), include_defaults=False))

The task files include the harness's own and replace only the data source, so nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.model import LM

from quadriga.errors import EvaluationError
from quadriga.evaluate.data import Data
from quadriga.evaluate.model import LanguageModel
from quadriga.evaluate.tasks.choice import arc_question

_DEFAULT_NEW_TOKENS = 256


class HarnessLM(LM):  # type: ignore[misc]  # lm_eval has no types
    """Makes a :class:`~quadriga.evaluate.model.LanguageModel` usable as the harness's ``LM``.

    The model applies its own chat template: create it with ``chat=True`` and do not set the harness's
    ``apply_chat_template``.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of each (context, continuation)."""
        answers = self.model.loglikelihoods([request.args for request in requests])
        return [(answer.logprob, answer.greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text."""
        return [answer.logprob for answer in self.model.rolling([request.args[0] for request in requests])]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each prompt with its own options; requests with equal options are sent together.

        Raises:
            EvaluationError: a generation option that is not supported here.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        answers = [""] * len(requests)
        for options, members in groups.items():
            known = _generation(json.loads(options))
            written = self.model.generate([requests[i].args[0] for i in members], **known)
            for i, text in zip(members, written, strict=True):
                answers[i] = text
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Not supported: raises EvaluationError (see the class docstring)."""
        raise EvaluationError("the harness's apply_chat_template is not supported: create the model with chat=True")


def _generation(options: dict[str, Any]) -> dict[str, Any]:
    until = options.pop("until", [])
    n = options.pop("max_gen_toks", options.pop("max_new_tokens", _DEFAULT_NEW_TOKENS))
    temperature = float(options.pop("temperature", 0.0))
    sample = options.pop("do_sample", temperature > 0)
    if options:
        raise EvaluationError(f"generation options must be until, max_gen_toks, temperature; got {', '.join(options)}")
    stops = [until] if isinstance(until, str) else list(until)
    return {"max_new_tokens": n, "stop": stops, "temperature": temperature if sample else 0.0}


_STOCK = Path(lm_eval.tasks.__file__).parent


def write_tasks(folder: Path, data: Data | None = None) -> list[str]:
    """Write task files over the local data, for ``TaskManager(include_path=folder)``.

    Args:
        folder: created if missing; the files refer to the data by absolute path.
        data: where the data is; default: ``Data()``.

    Returns:
        The tasks' names: quadriga_hellaswag, _winogrande, _arc_challenge, _gsm8k and _mmlu_SUBJECT.

    Raises:
        EvaluationError: missing or changed data.
    """
    data = data or Data()
    folder.mkdir(parents=True, exist_ok=True)
    checked = ("hellaswag/validation", "winogrande/validation_xl", "gsm8k/train", "gsm8k/test")
    paths = {name: data.path(f"{name}.jsonl") for name in checked}
    none = dict.fromkeys(("training_split", "validation_split"))
    itself = {**none, "test_split": "validation", "fewshot_split": "validation"}  # shots from the questions
    splits = {split: _arc_file(folder, data, split) for split in ("test", "validation")}
    pool = {"training_split": None, "fewshot_split": "validation"}
    gsm8k = {split: paths[f"gsm8k/{split}"] for split in ("train", "test")}
    names = [
        _write(folder, "hellaswag", "hellaswag/hellaswag.yaml", {"validation": paths[checked[0]]}, itself),
        _write(folder, "winogrande", "winogrande/default.yaml", {"validation": paths[checked[1]]}, itself),
        _write(folder, "gsm8k", "gsm8k/gsm8k.yaml", gsm8k, {}),
        _write(folder, "arc_challenge", "arc/arc_easy.yaml", splits, pool),
    ]
    subjects: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for split in ("dev", "test"):
        for row in data.rows(f"mmlu/{split}.jsonl"):
            subjects.setdefault(row["subject"], {}).setdefault(split, []).append(row)
    for subject, rows in subjects.items():
        files = {split: _jsonl(folder / f"mmlu_{subject}_{split}.jsonl", some) for split, some in rows.items()}
        names.append(_write(folder, f"mmlu_{subject}", f"mmlu/default/mmlu_{subject}.yaml", files, {}))
    return names


def _write(folder: Path, name: str, stock: str, files: dict[str, Path], more: dict[str, Any]) -> str:
    """Write one task file as JSON, which is valid YAML."""
    task = f"quadriga_{name}"
    body = {
        "include": str(_STOCK / stock),
        "task": task,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        **more,
    }
    (folder / f"{task}.yaml").write_text(json.dumps(body, indent=1) + "\n")
    return task


def _arc_file(folder: Path, data: Data, split: str) -> Path:
    """Write one split of ARC in the format of the Hugging Face data set."""
    rows = []
    for row in data.rows(f"arc/challenge_{split}.jsonl"):
        one = arc_question(row)
        labels = list("ABCDE"[: len(one.choices)])
        text = one.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        choices = {"text": list(one.choices), "label": labels}
        rows.append({"question": text, "choices": choices, "answerKey": labels[one.gold]})
    return _jsonl(folder / f"arc_challenge_{split}.jsonl", rows)


def _jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path.resolve()
