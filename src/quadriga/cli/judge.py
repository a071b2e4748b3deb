"""``quadriga judge``: two runs' answers, compared by a judge in both orders."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quadriga.cli import options


def judge_command(
    a: options.RunA,
    b: options.RunB,
    judge: options.Judge = None,
    judge_model: options.JudgeModel = None,
    task: Annotated[str, typer.Option(help="Whose recorded answers are compared.")] = "mt_bench",
    out: options.OutFolder = None,
    json: options.Json = False,
) -> None:
    """Let a judge choose the better of two runs' answers, each pair in both orders. Killed, the same command goes on.

    An answer wins only if it wins from both places; a change of mind is a tie. Verdicts go to --out, else to B.
    """
    from dataclasses import asdict

    from quadriga.cli.eval import open_judge, print_table
    from quadriga.cli.progress import progress_count
    from quadriga.errors import EvaluationError
    from quadriga.evaluate import pairwise
    from quadriga.evaluate.data import Data

    if judge is None:
        raise EvaluationError("answers are compared by a judge: give one with --judge (a model, or an API's address)")
    with progress_count(task) as show:
        found = pairwise.compare(a, b, task, open_judge(judge, judge_model), Data(), out or b, progress=show)
    if json:
        print(options.as_json({"task": task, **asdict(found)}))
        return
    share = f"{100 * found.share.value:.1f}"
    share += "" if found.share.stderr is None else f" ± {100 * found.share.stderr:.1f}"
    print_table(
        [
            ("task", "pairs", "B wins", "ties", "A wins", "B's share, %", "same verdict twice, %", "p"),
            (
                *(task, str(found.n), str(found.wins), str(found.ties), str(found.losses), share),
                *(f"{100 * found.consistent:.1f}", f"{found.p:.3g}"),
            ),
        ]
    )
    print(f"verdicts in {(out or b) / 'pairs' / f'{task}.jsonl'}", file=sys.stderr)
