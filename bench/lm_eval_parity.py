"""Our log-likelihoods, answers and accuracies beside lm_eval's own transformers backend, on the same weights and items.

    quadriga convert smollm2-135m-instruct smol-hf --to hf
    python bench/lm_eval_parity.py smollm2-135m-instruct smol-hf bench/results/lm_eval_parity.json [--limit 200]
    python bench/lm_eval_parity.py smollm2-135m-instruct smol-hf OUT.json --speed 200      HellaSwag items a second

Three ways for each task: (a) lm_eval with transformers in float32 on the exported weights; (b) lm_eval with our LM
class; (c) ``quadriga eval``'s own harness. Speed alternates (a) and (c) over the same items in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import quadriga
from quadriga.engine.text_model import TextModel
from quadriga.evaluate import report
from quadriga.evaluate.data import Data
from quadriga.evaluate.items import AnswerItem, ChoiceItem
from quadriga.evaluate.lm_eval_model import HarnessLM, write_tasks
from quadriga.evaluate.tasks import TASKS

PLAN: dict[str, tuple[list[str], int]] = {
    "hellaswag": (["quadriga_hellaswag"], 0),
    "mmlu": (["quadriga_mmlu_abstract_algebra", "quadriga_mmlu_anatomy"], 2),
    "winogrande": (["quadriga_winogrande"], 1),
    "arc_challenge": (["quadriga_arc_challenge"], 0),
    "gsm8k": (["quadriga_gsm8k"], 1),
}
"""Our task -> lm_eval's, and the shots."""


def harness(
    lm: Any, names: list[str], shots: int, limit: int, manager: TaskManager, cache: Path | None = None
) -> list[dict[str, Any]]:
    """lm_eval's samples in the order of the data."""
    result = lm_eval.simple_evaluate(
        lm,
        tasks=names,
        num_fewshot=shots,
        limit=limit // len(names),
        task_manager=manager,
        use_cache=None if cache is None else str(cache),
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return [s for name in names for s in sorted(result["samples"][name], key=lambda s: (s["filter"], s["doc_id"]))]


def answers_of(samples: list[dict[str, Any]]) -> list[str]:
    """What was generated, an item each; lm_eval lists an item once for every filter."""
    return [s["resps"][0][0] for s in samples if s["filter"] == samples[0]["filter"]]


def likelihoods(samples: list[dict[str, Any]]) -> list[list[float]]:
    """Per item, the log-probability of each choice."""
    by_item: list[list[float]] = []
    for sample in samples:
        by_item.append([float(r[0][0]) for r in sample["resps"]])
    return by_item


def compare(
    name: str, model: TextModel, hf: Any, manager: TaskManager, limit: int, cache: Path | None
) -> dict[str, Any]:
    """All three ways over one task."""
    names, shots = PLAN[name]
    seconds = {}
    started = time.perf_counter()
    theirs = harness(hf, names, shots, limit, manager, cache)
    seconds["lm_eval + transformers"] = time.perf_counter() - started
    started = time.perf_counter()
    through = harness(HarnessLM(model), names, shots, limit, manager)
    seconds["lm_eval + our LM"] = time.perf_counter() - started
    task = TASKS[name]
    items = task.items(Data(), model, shots)[:limit]
    started = time.perf_counter()
    row: dict[str, Any] = {"items": len(items), "shots": shots}
    if name == "gsm8k":
        prompts = [item.prompt for item in items if isinstance(item, AnswerItem)]
        ours = model.generate(prompts, max_new_tokens=task.max_new_tokens, stop=task.stop)
        texts, both = answers_of(theirs), answers_of(through)
        row["same answers, ours and theirs"] = sum(a == b for a, b in zip(ours, texts, strict=True))
        row["same answers, our LM and theirs"] = sum(a == b for a, b in zip(both, texts, strict=True))
        for key, scores in {"ours": ours, "theirs": texts, "our LM": both}.items():
            graded = [item.grade(text) for item, text in zip(items, scores, strict=True)]  # type: ignore[arg-type]
            row[f"accuracy {key}"] = {m: sum(g[m] for g in graded) / len(graded) for m in graded[0]}
        row["right by lm_eval's own grading"] = {
            f: sum(s["exact_match"] for s in theirs if s["filter"] == f) for f in {s["filter"] for s in theirs}
        }
    else:
        pairs = [pair for item in items if isinstance(item, ChoiceItem) for pair in item.pairs]
        answers = model.loglikelihoods(pairs)
        a = [p for one in likelihoods(theirs) for p in one]
        b = [p for one in likelihoods(through) for p in one]
        n = [answer.n_tokens for answer in answers]
        row["largest difference a token, ours"] = max(
            abs(x - y.logprob) / k for x, y, k in zip(a, answers, n, strict=True)
        )
        row["largest difference a token, our LM"] = max(abs(x - y) / k for x, y, k in zip(a, b, n, strict=True))
        graded, at = [], 0
        for item in items:
            assert isinstance(item, ChoiceItem)
            graded.append(item.grade(answers[at : at + len(item.pairs)]))
            at += len(item.pairs)
        for metric in ("acc", "acc_norm"):
            if metric in theirs[0]:
                row[metric] = {
                    "theirs": sum(float(s[metric]) for s in theirs) / len(theirs),
                    "our LM": sum(float(s[metric]) for s in through) / len(through),
                    "ours": sum(g[metric] for g in graded) / len(graded),
                }
    seconds["quadriga eval"] = time.perf_counter() - started
    row["seconds"] = {k: round(v, 1) for k, v in seconds.items()}
    return row


def speed(model: TextModel, hf: Any, manager: TaskManager, n: int, rounds: int) -> dict[str, Any]:
    """HellaSwag items a second, both sides in turn over the same items; by the clock and by processor seconds, which
    say the same on a machine that others use too."""
    per_round = n // rounds
    items = [item for item in TASKS["hellaswag"].items(Data(), model)[:n] if isinstance(item, ChoiceItem)]
    instances = _requests(manager, n)
    sides = ("quadriga", "lm_eval + transformers")
    rates: dict[str, dict[str, list[float]]] = {side: {"clock": [], "processor": []} for side in sides}
    for r in range(rounds):
        some = [pair for item in items[r * per_round : (r + 1) * per_round] for pair in item.pairs]
        mine = instances[r * per_round * 4 : (r + 1) * per_round * 4]
        ours = _timed(rates[sides[0]], per_round, partial(model.loglikelihoods, some))
        theirs = _timed(rates[sides[1]], per_round, partial(hf.loglikelihood, mine, disable_tqdm=True))
        worst = max(abs(a.logprob - b[0]) / a.n_tokens for a, b in zip(ours, theirs, strict=True))
        for kind in ("clock", "processor"):
            print(f"round {r}, {kind}:", *(f"{rates[side][kind][-1]:.2f} items/s" for side in sides), flush=True)
        print(f"round {r}, largest difference a token: {worst:.1e}", flush=True)
    medians = {side: {k: statistics.median(v) for k, v in kinds.items()} for side, kinds in rates.items()}
    ratios = {k: medians[sides[0]][k] / medians[sides[1]][k] for k in ("clock", "processor")}
    return {"items": n, "rounds": rates, "median items a second": medians, "ratio": ratios}


def _timed(rates: dict[str, list[float]], n: int, ask: Callable[[], Any]) -> Any:
    """What ``ask`` answers; its items a second are added to ``rates``."""
    clock, processor = time.perf_counter(), time.process_time()
    answers = ask()
    rates["clock"].append(n / (time.perf_counter() - clock))
    rates["processor"].append(n / (time.process_time() - processor))
    return answers


def _requests(manager: TaskManager, n: int) -> list[Any]:
    task = manager.load_task_or_group(["quadriga_hellaswag"])["quadriga_hellaswag"]
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=n)
    return list(task.instances)


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("hf", type=Path, help="the same weights as a Hugging Face directory")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--tasks", default=",".join(PLAN))
    parser.add_argument("--speed", type=int, metavar="ITEMS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="of transformers")
    parser.add_argument("--cache", type=Path, help="where transformers' answers are kept, so that a run can go on")
    parser.add_argument("--threads", type=int, help="of both sides; default: all processors")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    model = TextModel(quadriga.load(args.model, format="float32", kv_format="float32", threads=args.threads))
    hf = HFLM(pretrained=str(args.hf), dtype="float32", device="cpu", batch_size=args.batch)
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    result |= {"commit": report.commit(), "model": model.identity, "batch of transformers": args.batch}
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        manager = TaskManager(include_path=folder, include_defaults=False)
        if args.speed:
            result["speed"] = speed(model, hf, manager, args.speed, args.rounds)
        else:
            for name in args.tasks.split(","):
                result[name] = compare(name, model, hf, manager, args.limit, args.cache)
                print(name, json.dumps(result[name]), flush=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
