"""What DBRX's launch claimed, and how each claim is tried here.

Sources: "Introducing DBRX", Databricks, 27 March 2024, and the posts that it links to. ``at_least`` and ``at_most`` are
what counts as reproduced; ``missing`` says why a claim has no result, where more than a command is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.bench.claims import measures
from quadriga.bench.claims.measures import Measured
from quadriga.bench.claims.steps import Step, Values
from quadriga.errors import EvaluationError


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of a claim's steps is run.

    Attributes:
        seeds: training runs of each kind.
        share: of the recipes' tokens; below 1 it is a short try, and the record says so.
        threads: of each training run and benchmark; None: all.
        model: whose weights the claims about quality are tried with.
        dtype: of training; bfloat16 where the processor multiplies in it.
        judge, judge_model: who grades answers: a chat API's address and the model's name there, or a model here.
    """

    seeds: int = 3
    share: float = 1.0
    threads: int | None = None
    model: str = "dbrx-instruct"
    dtype: str = "bfloat16"
    judge: str | None = None
    judge_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim.

    Attributes:
        says: the claim in a sentence.
        published: the published figure, as text.
        unit: of the value that is measured.
        at_least, at_most: the bounds of what counts as reproduced.
        how: what is done here, and how it differs from what was claimed.
        steps: the commands, for a scale.
        measure: their files -> values.
        missing: why there is no result.
        picture: of a result that has no curves, in docs/.
    """

    name: str
    says: str
    published: str
    unit: str
    how: str
    steps: Callable[[Scale], list[Step]]
    measure: Callable[[Path], Measured]
    at_least: float | None = None
    at_most: float | None = None
    missing: str = ""
    picture: str = ""


NANO = "nano"  # the run of recipes/nano.toml as it stands
SHARED = (NANO, "nano-mpt", "nano-dbrx")
"""Runs that several claims have, so that they lie beside them."""


def trained(scale: Scale, recipes: dict[str, tuple[str, Values]], tokens: dict[str, float] | None = None) -> list[Step]:
    """Training runs NAME-s1, NAME-s2... of each recipe with its changes: one seed of all, then the next seed.

    ``tokens``: name -> how many times as long as its recipe says.
    """
    steps = []
    for seed in range(1, scale.seeds + 1):
        for name, (recipe, changes) in recipes.items():
            run = f"{name}-s{seed}"
            argv = ["train", f"{{out}}/{run}.toml"]
            argv += [] if scale.threads is None else ["--threads", str(scale.threads)]
            own: Values = {"seed": seed, "parallel.dtype": scale.dtype} | changes
            times = scale.share * (tokens or {}).get(name, 1.0)
            step = Step(name=run, argv=tuple(argv), recipe=recipe, changes=own, tokens=times, shared=name in SHARED)
            steps.append(step)
    return steps


def _corpus(vocabulary: int) -> list[Step]:
    """The four domains with a vocabulary of this size."""
    prepare = ("data", "prepare", "{recipes}/mix.toml", "--train-tokenizer", str(vocabulary), "--out", _mix(vocabulary))
    return [Step(name=f"corpus-{vocabulary}", argv=prepare, shared=True)]


def _mix(vocabulary: int) -> str:
    return f"{{shared}}/corpora/mix-{vocabulary}"


def _counts(vocabulary: int) -> list[Step]:
    """What that corpus has of each domain: tokens and bytes, by which losses of two vocabularies compare."""
    count = ("data", "inspect", _mix(vocabulary), "--json")
    return [Step(name=f"count-{vocabulary}", argv=count, output=f"corpus-{vocabulary}.json")]


def _on(vocabulary: int, **model: Any) -> Values:
    """Changes of a recipe: its corpus, and keys of its model."""
    return {"data.corpora": [_mix(vocabulary)]} | {f"model.{key}": value for key, value in model.items()}


def _moe_flops(scale: Scale) -> list[Step]:
    recipes = {NANO: "nano.toml", "nano-dense": "nano-dense.toml", "nano-dense-2x": "nano-dense-2x.toml"}
    return [*_corpus(8192), *trained(scale, {name: (recipe, _on(8192)) for name, recipe in recipes.items()})]


_SIZES = {
    96: {"modern": (96, 3, 40), "dense": (96, 3, 320), "dense-2x": (128, 5, 544)},
    128: {"modern": (128, 4, 56), "dense": (128, 4, 448), "dense-2x": (192, 5, 640)},
    192: {"modern": (192, 6, 80), "dense": (192, 6, 640), "dense-2x": (256, 8, 896)},
}
"""Width of the mixture -> each kind of model's (d_model, layers, d_ff); heads are 32 wide."""
_RECIPE = {"modern": "modern.toml", "dense": "nano-dense.toml", "dense-2x": "nano-dense-2x.toml"}


def _moe_flops_sizes(scale: Scale) -> list[Step]:
    recipes = {}
    for width, kinds in _SIZES.items():
        for kind, (d_model, n_layers, d_ff) in kinds.items():
            heads = {"n_heads": d_model // 32, "n_kv_heads": 1 if width < 192 else 2}
            sizes = _on(8192, d_model=d_model, n_layers=n_layers, d_ff=d_ff, **heads)
            recipes[f"{kind}-{width}"] = (_RECIPE[kind], sizes)
    return [*_corpus(8192), *trained(scale, recipes)]


def _mpt_compute(scale: Scale) -> list[Step]:
    runs = {
        "nano-mpt": ("claims/nano-mpt.toml", _on(4096)),
        "nano-dbrx": ("claims/nano-dbrx.toml", _on(8192)),
        "nano-mpt-4x": ("claims/nano-mpt.toml", _on(4096)),
    }
    corpora = [*_corpus(4096), *_counts(4096), *_corpus(8192), *_counts(8192)]
    return [*corpora, *trained(scale, runs, {"nano-mpt-4x": 4.0})]


_MUON: Values = {
    "optimiser.name": "muon",
    "optimiser.learning_rate": 2e-3,
    "optimiser.muon_learning_rate": 0.01,
    "optimiser.betas": None,
    "optimiser.weight_decay": None,
    "schedule.kind": "wsd",
    "schedule.decay_share": 0.3,
    "schedule.final_share": 0.02,
}
"""The optimiser and schedule of recipes/nano.toml, in MPT's recipe."""

_LADDER: dict[str, tuple[str, str, Values]] = {
    "nano-mpt": ("MPT's recipe", "claims/nano-mpt.toml", _on(4096)),
    "mpt-vocabulary": ("a vocabulary of 8,192", "claims/nano-mpt.toml", _on(8192)),
    "mpt-muon": ("Muon; warm-up, stable, decay", "claims/nano-mpt.toml", _on(8192) | _MUON),
    "dense": ("RoPE, shared keys, gated SiLU", "nano-dense.toml", _on(8192)),
    NANO: ("16 experts of which 4 work", "nano.toml", _on(8192)),
    "nano-dbrx": ("a curriculum", "claims/nano-dbrx.toml", _on(8192)),
}
"""Runs from MPT's recipe to DBRX's: the run -> what it changes of the one before, its recipe, its values."""


def _mpt_parts(scale: Scale) -> list[Step]:
    runs = {name: (recipe, values) for name, (_, recipe, values) in _LADDER.items()}
    return [*_corpus(4096), *_counts(4096), *_corpus(8192), *_counts(8192), *trained(scale, runs)]


def _fine_grained(scale: Scale) -> list[Step]:
    coarse = _on(8192, n_experts=8, top_k=2, d_ff=320)
    return [*_corpus(8192), *trained(scale, {"coarse": ("nano.toml", coarse), NANO: ("nano.toml", _on(8192))})]


def _aggregators(scale: Scale) -> list[Step]:
    runs = {kind: ("nano.toml", _on(8192, aggregate=kind)) for kind in ("vote", "fuse")}
    return [*_corpus(8192), *trained(scale, {NANO: ("nano.toml", _on(8192))} | runs)]


def _info(scale: Scale) -> list[Step]:
    return [Step(name="info", argv=("info", "dbrx-132b", "--json"), output="info.json")]


def _plan(*words: str) -> Callable[[Scale], list[Step]]:
    return lambda scale: [Step(name="plan", argv=("plan", *words, "--json"), output="plan.json")]


def _bench_claim(scale: Scale) -> list[Step]:
    threads = () if scale.threads is None else ("--threads", str(scale.threads))
    return [Step(name="bench", argv=("bench", "claim", "--rounds", "7", *threads, "--csv", "{out}/claim.csv"))]


def _evaluated(tasks: str, *words: str) -> Callable[[Scale], list[Step]]:
    def steps(scale: Scale) -> list[Step]:
        return [Step(name="eval", argv=("eval", "--model", scale.model, "--tasks", tasks, *words, "--out", "{out}"))]

    return steps


def _mt_bench(scale: Scale) -> list[Step]:
    """Without a judge, its place is named, so that the command can be read; `quadriga eval` then refuses it."""
    words = ["eval", "--model", scale.model, "--tasks", "mt_bench", "--judge", scale.judge or "JUDGE"]
    words += [] if scale.judge_model is None else ["--judge-model", scale.judge_model]
    return [Step(name="eval", argv=(*words, "--out", "{out}"))]


_NEEDS_WEIGHTS = "DBRX's weights (263 GB) and a machine that holds them: give --weights"

CLAIMS = (
    Claim(
        name="parameters",
        says="132B total parameters, of which 36B are active on any input",
        published="132, 36",
        unit="billion parameters",
        how="Counted from the shapes of every parameter.",
        steps=_info,
        measure=measures.parameters,
        at_least=131.5,
        at_most=132.5,
    ),
    Claim(
        name="combinations",
        says="65x more possible combinations of experts than 2 of 8",
        published="65",
        unit="times",
        how="Binomials of the model's configuration.",
        steps=_info,
        measure=measures.combinations,
        at_least=65,
        at_most=65,
    ),
    Claim(
        name="training-time",
        says="trained on 3,072 H100 and 12T tokens within three months",
        published="92",
        unit="days",
        how="The planner's best mesh, 5 % lost to faults. The three months are for everything, not for one run.",
        steps=_plan("dbrx-132b", "--gpus", "3072xH100", "--tokens", "12T"),
        measure=measures.planned_days,
        at_most=92,
    ),
    Claim(
        name="mpt-days",
        says="MPT-7B: 9.5 days on 440 A100-40GB, 1T tokens, about $200,000",
        published="9.5",
        unit="days",
        how="The planner's best mesh for the same model, tokens, accelerator and program (LLM Foundry's), to check "
        "the planner. docs/plan.md says what of the difference is explained.",
        steps=_plan(
            *("mpt-7b", "--gpus", "440xA100-40GB", "--stack", "foundry", "--tokens", "1T"),
            *("--seq-len", "2048", "--context", "2048"),
        ),
        measure=measures.planned_days,
        at_least=8.5,
        at_most=10.5,
    ),
    Claim(
        name="mpt-compute",
        says="the whole recipe needs nearly 4x less compute than MPT-7B for the same quality",
        published="3.7",
        unit="times",
        how="Two recipes of 6M to 24M tokens at equal width and depth: MPT's (ALiBi, LayerNorm, GELU, its own "
        "vocabulary, one mix, Lion) and DBRX's (RoPE, gated, shared keys, 16 experts, larger vocabulary, curriculum, "
        "Muon). Arithmetic to equal bits a byte, from two lengths of MPT's run. Four learning rates of MPT's were "
        "tried, and nothing else was tuned.",
        steps=_mpt_compute,
        measure=measures.compute_to_equal_bits,
        at_least=3.3,
    ),
    Claim(
        name="mpt-parts",
        says="(asked here) every part of the recipe helps: vocabulary, optimiser, layers, experts, curriculum",
        published="none",
        unit="bits a byte",
        how="From MPT's recipe to DBRX's by one change at a time, 6M tokens each. The value is of the change that "
        "helps least.",
        steps=_mpt_parts,
        measure=measures.bits_by_change({name: change for name, (change, _, _) in _LADDER.items()}),
        at_most=0.0,
    ),
    Claim(
        name="moe-flops",
        says="a mixture needs about half the FLOPs of a dense model for the same quality",
        published="1.7 to 2",
        unit="times",
        how="A nano mixture (16 experts, 4 active) beside dense models of its active size and of twice the work, 6M "
        "tokens.",
        steps=_moe_flops,
        measure=measures.flops_to_equal_loss,
        at_least=1.7,
        picture="images/equal-loss.svg",
    ),
    Claim(
        name="moe-flops-sizes",
        says="(the same with a recipe of today) a mixture needs less than half the FLOPs, and the gain grows with size",
        published="1.7 to 2",
        unit="times",
        how="`recipes/modern.toml` (64 small experts of which 6 work, two that every token visits, balanced by a "
        "bias) at three widths, each beside dense models of its active size and of twice the work, 6M tokens. The "
        "value is the largest width's. For much larger models Open Athena reports 6.7 with 256 experts.",
        steps=_moe_flops_sizes,
        measure=measures.flops_by_size(tuple(_SIZES)),
        at_least=2.0,
    ),
    Claim(
        name="fine-grained",
        says="16 experts of which 4 work give a better model than 8 of which 2 work",
        published="better, no figure",
        unit="nats a token",
        how="The nano beside one of 8 experts, 2 active, each twice as wide: equal parameters, equal work.",
        steps=_fine_grained,
        measure=measures.loss_differences(NANO, than="coarse"),
        at_most=0.0,
    ),
    Claim(
        name="aggregators",
        says="(asked here, not claimed there) a vote of the experts, or a learned fusion, beats their weighted sum",
        published="none",
        unit="nats a token",
        how="The nano with each of the three; the best of vote and fuse less the weighted sum. The launch only uses "
        "the sum.",
        steps=_aggregators,
        measure=measures.loss_differences("vote", "fuse", than=NANO),
        at_most=0.0,
    ),
    Claim(
        name="inference",
        says="up to 2x faster inference than LLaMA2-70B",
        published="up to 2",
        unit="times",
        how="One layer of each at full width with random weights at equal bits, and the head, times the layers; on "
        "this machine.",
        steps=_bench_claim,
        measure=measures.inference,
        at_least=1.8,
        picture="images/claim.svg",
    ),
    Claim(
        name="quality",
        says="above Mixtral, LLaMA2-70B and Grok-1: 74.5 % mean of the leaderboard's six tasks",
        published="74.5",
        unit="percent",
        how="The six tasks with the leaderboard's shots.",
        steps=_evaluated("leaderboard"),
        measure=measures.table_mean,
        at_least=73.5,
        missing=_NEEDS_WEIGHTS,
    ),
    Claim(
        name="programming",
        says="HumanEval pass@1 of 70.1 %, above GPT-3.5 and CodeLLaMA-70B",
        published="70.1",
        unit="",
        how="HumanEval, greedy, one sample, in the model's chat template.",
        steps=_evaluated("humaneval", "--chat"),
        measure=measures.main_figure("humaneval"),
        at_least=0.681,
        missing=_NEEDS_WEIGHTS,
    ),
    Claim(
        name="conversation",
        says="MT-Bench of 8.39, between Mistral Medium and Claude 3 Haiku, below GPT-3.5 Turbo's 8.58",
        published="8.39 ± 0.08",
        unit="of 10",
        how="MT-Bench's 80 questions with the judge that --judge names; the launch used corrected questions and GPT-4.",
        steps=_mt_bench,
        measure=measures.main_figure("mt_bench"),
        at_least=8.31,
        missing=f"{_NEEDS_WEIGHTS}, and --judge",
    ),
    Claim(
        name="long-context",
        says="better than GPT-3.5 Turbo at 2k to 32k tokens, by position and by length",
        published="19.9 to 65.1 %",
        unit="",
        how="A needle at five depths of 1k to 32k tokens; KV-Pairs and HotpotQAXL are not public in this form.",
        steps=_evaluated("needle"),
        measure=measures.main_figure("needle"),
        at_least=0.9,
        missing=f"{_NEEDS_WEIGHTS}; no model here was extended to 32k",
    ),
)
"""All claims, in the order of the launch: the model, its training, its use, its quality."""


def claim(name: str) -> Claim:
    """A claim by name.

    Raises:
        EvaluationError: there is none of that name.
    """
    for one in CLAIMS:
        if one.name == name:
            return one
    raise EvaluationError(f"there is no claim {name!r}: choose from {', '.join(one.name for one in CLAIMS)}")
