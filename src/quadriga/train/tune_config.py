"""The configuration of a tuning run: frozen structs read from one TOML file. Imports no torch.

    run = "runs/dolly"                    the run's folder
    model = "smollm2-135m-instruct"       a catalogue name, a path, hf:ORG/REPO
    objective = "sft"                     sft | text | distill | dpo | orpo | grpo
    [lora]                                a low-rank adapter; without it every parameter is trained
    [data] [preference] [grpo] [distill]
    [schedule] [optimiser] [router] [parallel] [guard] [checkpoint] [log] [evaluate] [ema]    as in pre-training

An unknown key is an error that suggests the nearest known one.
"""

from __future__ import annotations

from typing import Literal

from quadriga.errors import ConfigError
from quadriga.model.adapter_spec import LoraSpec
from quadriga.train.config import (
    CheckpointSection,
    EmaSection,
    EvaluateSection,
    GuardSection,
    LogSection,
    OptimiserSection,
    ParallelSection,
    RouterSection,
    ScheduleSection,
    Section,
    require_run,
    require_whole_documents,
)

Objectives = Literal["sft", "text", "distill", "dpo", "orpo", "grpo"]


class LoraSection(Section, frozen=True):
    """The LoRA adapter; see ``model.adapter_spec``."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention",)
    """Which matrices get an adapter: attention, router, experts, shared, ffn, embeddings, head."""
    dropout: float = 0.0
    start: str | None = None
    """An adapter to start from; its rank, alpha and targets then replace those given here."""
    base_format: Literal["float32", "q8", "q4"] = "float32"
    """QLoRA: storage format of the frozen matrices in attention, experts and dense networks."""

    def spec(self) -> LoraSpec:
        """The section as a ``LoraSpec``."""
        return LoraSpec(rank=self.rank, alpha=self.alpha, targets=self.targets, dropout=self.dropout)

    def __post_init__(self) -> None:
        self.spec()


class TuneData(Section, frozen=True):
    """Rows of JSON lines in any known layout (``train.chat_data``)."""

    files: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    """Files for the held-out loss (grpo: reward); empty: hold out every ``held_out_every``-th row of ``files``."""
    held_out_every: int = 50
    max_rows: int | None = None
    """Stop reading after this many usable rows; None: read all."""
    max_bad_rows: int = 100
    seq_len: int = 512
    rows: int = 4
    """Rows of seq_len tokens per batch; several examples are packed into a row. With grpo: questions per batch."""
    epochs: int | None = None
    """Times that the rows are read, where ``schedule.steps`` does not say how long the run is; None: once."""
    template: str | None = None
    """Name of a chat template (chatml, instruct), for models without one."""
    label: str | None = None
    """objective "text": the column by whose values the held-out loss is reported."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("data.files must name at least one file of JSON lines")
        for name in ("seq_len", "rows", "epochs", "held_out_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}")
        if self.held_out_every == 1 and not self.held_out:
            raise ConfigError("data.held_out_every must be at least 2: with 1 no row would be left to train on")
        if self.max_rows is not None and self.max_rows < 1:
            raise ConfigError(f"data.max_rows must be at least 1, got {self.max_rows}; leave it out to read all")
        if self.max_bad_rows < 0:
            raise ConfigError(f"data.max_bad_rows must be 0 or above, got {self.max_bad_rows}")


class PreferenceSection(Section, frozen=True):
    """Settings of dpo and orpo."""

    beta: float = 0.1
    """dpo: how strongly the model is kept close to the reference."""
    odds_weight: float = 0.1
    """orpo: weight of the odds-ratio term beside the chosen answer's loss."""

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.odds_weight >= 0:
            raise ConfigError(
                "preference.beta must be above 0 and preference.odds_weight 0 or above; got "
                f"{self.beta:g} and {self.odds_weight:g}"
            )


_JUDGE = (
    "Rate this answer to the question from 0 (worthless) to 10 (perfect). Write the number alone.\n\n"
    "Question:\n{question}\n\nAnswer:\n{answer}\n\nRating:"
)

_REWARD_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "number": ((), ()),
    "text": ((), ()),
    "finished": ((), ()),
    "regex": (("pattern", "column"), ()),
    "json": (("schema", "column"), ()),
    "code": ((), ("column", "timeout_s")),
    "judge": (("url",), ("model", "prompt")),
    "python": (("function",), ()),
}
"""Kind -> (keys of which exactly one is given, keys that may be)."""

_REWARD_DEFAULTS: dict[str, object] = {
    **dict.fromkeys(("pattern", "schema", "column", "url", "model", "function")), "prompt": _JUDGE, "timeout_s": 10.0
}  # fmt: skip


class RewardSection(Section, frozen=True):
    """One of the rewards of grpo; ``train.rewards`` says what each kind is."""

    kind: Literal["number", "text", "regex", "json", "code", "judge", "finished", "python"]
    weight: float = 1.0
    pattern: str | None = None
    """regex: what is looked for in the answer."""
    schema: str | None = None
    """json: a file with a JSON schema."""
    column: str | None = None
    """regex, json: the row's column with the pattern or schema. code: with the tests; None: "test"."""
    url: str | None = None
    """judge: address of an OpenAI-compatible API, up to /v1; the key is QUADRIGA_API_KEY."""
    model: str | None = None
    """judge: its model's name there."""
    prompt: str = _JUDGE
    """judge: what it is asked; {question}, {answer} and {wanted} are replaced."""
    function: str | None = None
    """python: module:function, which takes a list of ``train.rewards.Attempt`` and returns a list of numbers."""
    timeout_s: float = 10.0
    """code: seconds for each program."""

    def __post_init__(self) -> None:
        one_of, others = _REWARD_KEYS[self.kind]
        given = [name for name, value in _REWARD_DEFAULTS.items() if getattr(self, name) != value]
        unused = [name for name in given if name not in (*one_of, *others)]
        if unused:
            raise ConfigError(f"a reward of the kind {self.kind!r} has no use for {', '.join(unused)}: leave it out")
        if not self.timeout_s > 0:
            raise ConfigError(f"grpo.rewards.timeout_s must be above 0, got {self.timeout_s:g}")
        if one_of and sum(name in given for name in one_of) != 1:
            raise ConfigError(f"a reward of the kind {self.kind!r} needs {' or '.join(one_of)}")
        if self.kind == "judge" and self.model is None:
            raise ConfigError("a reward of the kind 'judge' needs model, the judge's name at its address")


class GrpoSection(Section, frozen=True):
    """Settings of grpo: answers are sampled, rewarded, and made likelier or less likely by it."""

    samples: int = 4
    """Answers to every question."""
    max_new_tokens: int = 96
    temperature: float = 1.0
    kl_weight: float = 0.02
    """How strongly the model is kept close to the model before tuning; 0: not, and it is not computed."""
    updates: int = 1
    """Steps of the optimiser on the same answers, before new ones are sampled."""
    clip: float = 0.2
    """A token's probability may fall to 1 - clip of what it was when it was sampled, before it stops counting."""
    clip_high: float | None = None
    """It may rise to 1 + clip_high; None: as ``clip``."""
    rewards: tuple[RewardSection, ...] = (RewardSection(kind="number"),)
    """What an answer is worth: the sum of these."""
    sampler: Literal["engine", "model"] = "engine"
    """What samples: the serving engine on the CPU's kernels, or the trained module itself (one rank, slow)."""
    sampler_format: Literal["float32", "bfloat16", "q8"] = "float32"
    """How the engine stores its copy of the weights. Anything but float32 samples from a slightly different model."""

    def __post_init__(self) -> None:
        if self.samples < 2 or self.max_new_tokens < 1 or not 1e-5 <= self.temperature < float("inf"):
            raise ConfigError(
                "grpo needs samples >= 2, max_new_tokens >= 1 and temperature >= 1e-5, below which "
                f"all samples are equal; got {self.samples}, {self.max_new_tokens}, {self.temperature:g}"
            )
        if self.updates < 1 or not 0 < self.clip < 1 or not (self.clip_high is None or self.clip_high > 0):
            raise ConfigError(
                "grpo needs updates >= 1, clip within (0, 1) and clip_high above 0; got "
                f"{self.updates}, {self.clip:g}, {self.clip_high}"
            )
        if not self.kl_weight >= 0:
            raise ConfigError(f"grpo.kl_weight must be 0 or above, got {self.kl_weight:g}")
        if not self.rewards:
            raise ConfigError("grpo.rewards must have at least one reward, e.g. kind = 'number'")
        if self.sampler == "model" and self.sampler_format != "float32":
            raise ConfigError("grpo.sampler_format is for sampler = 'engine': the model samples in parallel.dtype")


class DistillSection(Section, frozen=True):
    """Settings of distill."""

    teacher: str | None = None
    """A catalogue name, a path or hf:ORG/REPO, with the vocabulary of the model; with ``url`` its name there."""
    url: str | None = None
    """Address of an OpenAI-compatible API up to /v1 whose completions echo log-probabilities, ours or vLLM's."""
    top_k: int = 0
    """Of the teacher's distribution its most probable tokens, and all others as one; 0: all tokens."""
    temperature: float = 1.0
    """What both models' logits are divided by."""
    weight: float = 1.0
    """Of the divergence; the rest is of the row's own answer."""

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0.01 <= self.temperature <= 100 or not 0 < self.weight <= 1:
            raise ConfigError(
                "distill needs top_k >= 0, temperature from 0.01 to 100 and weight above 0, at most 1; got "
                f"{self.top_k}, {self.temperature:g}, {self.weight:g}"
            )
        if self.url is not None and (not 1 <= self.top_k <= 20 or self.temperature != 1.0):
            raise ConfigError(
                "distill.url needs top_k from 1 to 20, which is what such an API tells, and temperature 1; got "
                f"{self.top_k} and {self.temperature:g}"
            )


class TuneConfig(Section, frozen=True):
    """The configuration of a tuning run."""

    run: str
    model: str
    data: TuneData
    objective: Objectives = "sft"
    seed: int = 17
    lora: LoraSection | None = None
    preference: PreferenceSection = PreferenceSection()
    grpo: GrpoSection = GrpoSection()
    distill: DistillSection = DistillSection()
    schedule: ScheduleSection = ScheduleSection(warmup_steps=10)
    optimiser: OptimiserSection = OptimiserSection(learning_rate=2e-4, weight_decay=0.0)
    router: RouterSection = RouterSection()
    parallel: ParallelSection = ParallelSection()
    guard: GuardSection = GuardSection()
    checkpoint: CheckpointSection = CheckpointSection(keep=1)
    log: LogSection = LogSection()
    evaluate: EvaluateSection = EvaluateSection(every=100)
    ema: EmaSection = EmaSection()

    def __post_init__(self) -> None:
        require_run(self.run)
        router = self.router
        given = {"balance_loss": router.balance_loss, "z_loss": router.z_loss, "bias_rate": router.bias_rate}
        used = self.objective in ("sft", "text")
        for name, value in given.items():
            if value and not used:
                raise ConfigError(
                    f"router.{name} must be 0 with objective {self.objective!r}, which balances no experts; "
                    f"got {value:g}"
                )
        self._refuse_cuts()
        if (self.objective == "distill") != (self.distill.teacher is not None):
            raise ConfigError("distill.teacher is given with objective 'distill', and with no other")
        updates = self.grpo.updates
        for name, steps in (("checkpoint.every", self.checkpoint.every), ("schedule.steps", self.schedule.steps or 0)):
            if self.objective == "grpo" and steps % updates:
                raise ConfigError(
                    f"{name} must be a multiple of grpo.updates, since a run is saved between samplings: got {steps} "
                    f"and {updates}"
                )
        self._refuse_unused()
        if router.bias_rate and not router.bias_fade:
            raise ConfigError(
                "router.bias_fade must be above 0 with bias_rate: what tuning writes has no such bias, so it "
                "would not be the model that was tuned"
            )

    def _refuse_cuts(self) -> None:
        """Refuse to cut what an objective or an adapter needs whole."""
        ranks = self.parallel
        for name in ("tensor", "context", "pipeline"):
            if getattr(ranks, name) > 1 and self.objective not in ("sft", "text"):
                raise ConfigError(
                    f"parallel.{name} cuts rows or layers, and objective {self.objective!r} compares whole answers or "
                    "models: leave it at 1. With 'sft' and 'text' it may be above; this one runs over FSDP, "
                    "parallel.replicate and parallel.experts"
                )
        require_whole_documents(self.router, ranks)
        lora = self.lora
        if ranks.tensor > 1 and lora is not None and (lora.base_format != "float32" or lora.dropout):
            raise ConfigError(
                "parallel.tensor cuts an adapter's matrices by heads and columns, which packed blocks are not cut by, "
                "and dropped inputs would differ between the parts: with it lora.base_format must be 'float32' and "
                f"lora.dropout 0, got {lora.base_format!r} and {lora.dropout:g}. Or leave parallel.tensor at 1"
            )

    def _refuse_unused(self) -> None:
        """Refuse what would be left without effect."""
        if self.schedule.steps is not None and self.data.epochs is not None:
            raise ConfigError(
                f"schedule.steps ({self.schedule.steps}) and data.epochs ({self.data.epochs}) both say how long the "
                "run is: leave one of them out"
            )
        goal, data = self.objective, self.data
        for given, users, name in (
            (self.grpo != GrpoSection(), ("grpo",), "[grpo]"),
            (self.distill != DistillSection(), ("distill",), "[distill]"),
            (self.preference.beta != PreferenceSection().beta, ("dpo",), "preference.beta"),
            (self.preference.odds_weight != PreferenceSection().odds_weight, ("orpo",), "preference.odds_weight"),
            (data.template is not None, ("sft", "distill", "dpo", "orpo", "grpo"), "data.template"),
            (data.label is not None, ("sft", "text", "distill", "dpo", "orpo"), "data.label"),
            (bool(self.evaluate.prompts), ("sft", "text", "distill", "dpo", "orpo"), "evaluate.prompts"),
        ):
            if given and goal not in users:
                raise ConfigError(
                    f"{name} is used with objective {' and '.join(map(repr, users))} only; this run's is {goal!r}: "
                    "leave it out"
                )
