"""A training step beside transformers' DBRX on the same weights and tokens, and a mixture beside a dense network.

    python bench/train_step.py peers                      ours and transformers, alternating, one process each
    python bench/train_step.py peers --dtype bfloat16 --threads 1 --same-allocator --newest tf5   another transformers,
                                                          installed by pip install --target tf5 transformers
    python bench/train_step.py peers --vocab 100352 --rounds 1
    python bench/train_step.py experts                    16 and 64 experts against a dense network of equal active size
    python bench/train_step.py ranks --dtype bfloat16     2 ranks of one thread against transformers on two threads

Every measurement is a process of its own, as allocator settings belong to a process; the two sides take turns.
The step is whole: forward, balance loss, backward, clipping, AdamW, metrics. The first losses of both sides must
agree to 1e-3 (float32). Steps before the measured ones are not counted: oneDNN compiles its products in them. MFU is of
this machine's own matrix-product peak in the same dtype, measured in the same process. d_model 256, 8 layers, 16
experts of which 4, d_ff 448, sequence 512, batch 8.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from quadriga import runtime
from quadriga.model.config import AttentionSpec, DenseSpec, ModelConfig, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.model.families import dbrx
from quadriga.nn import devices
from quadriga.nn.transformer import Transformer
from quadriga.train import config as sections
from quadriga.train.initialise import new_parameters
from quadriga.train.losses import NextToken
from quadriga.train.memory_source import MemorySource
from quadriga.train.run import peak_flops
from quadriga.train.run_directory import RunDirectory
from quadriga.train.step_report import StepReport
from quadriga.train.trainer import Trainer
from quadriga.train.world import World

RESULTS = Path(__file__).parent / "results" / "train-step.csv"


def architecture(vocab: int, n_experts: int = 16) -> ModelConfig:
    """The model of TRAINING's comparison; ``n_experts`` 0 is the dense one of equal active size."""
    ffn: MoESpec | DenseSpec = MoESpec(
        d_ff=448, n_experts=n_experts or 1, top_k=min(4, n_experts or 1), activation="silu", aux_loss_weight=0.05
    )
    if not n_experts:
        ffn = DenseSpec(d_ff=4 * 448, activation="silu")
    return uniform_model(
        family="dbrx" if n_experts else "llama2",
        vocab_size=vocab,
        d_model=256,
        n_layers=8,
        max_seq_len=512,
        norm=NormSpec(kind="layer"),
        mixer=AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=64, clip_qkv=8.0, position=RopeSpec(theta=500_000.0)),
        ffn=ffn,
    )


def documents(vocab: int, rows: int) -> list[tuple[str, list[int]]]:
    """Rows of 512 random tokens, a document each."""
    generator = torch.Generator().manual_seed(0)
    return [("x", torch.randint(vocab, (512,), generator=generator).tolist()) for _ in range(rows)]


class Ours:
    """The trainer as `quadriga train` runs it."""

    def __init__(self, config: ModelConfig, dtype: str, rows: int, world: World | None = None) -> None:
        class Settings:
            seed, n_steps = 0, 10_000
            schedule = sections.ScheduleSection(kind="constant", warmup_steps=0)
            optimiser = sections.OptimiserSection(learning_rate=1e-3)
            router = sections.RouterSection(balance_form="hf")
            parallel = sections.ParallelSection(dtype=dtype, device="cpu")  # type: ignore[arg-type]
            guard = sections.GuardSection()
            checkpoint = sections.CheckpointSection()
            ema = sections.EmaSection()

        world = world or World()
        self.reports: list[StepReport] = []
        model = Transformer.from_parameters(config, new_parameters(config, seed=0, std=0.02))
        source = MemorySource(documents(config.vocab_size, rows), n_rows=rows, seq_len=512)
        self.trainer = Trainer(
            Settings(), model, source, NextToken(config, Settings.router, world), world=world,
            run=RunDirectory(Path(tempfile.mkdtemp())), listeners=[self],
        )  # fmt: skip

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_event(self, step: int, text: str) -> None:
        raise AssertionError(text)

    def on_rollback(self, step: int) -> None:
        raise AssertionError("no rollback is wanted here")

    def step(self) -> float:
        self.trainer.run_step()
        if not self.reports:  # only the first rank is told
            return 0.0
        report = self.reports[-1]
        return report.loss + 0.05 * report.extra.get("balance", 0.0)


class Theirs:
    """transformers' DbrxForCausalLM with SDPA, fused AdamW and clipping; bfloat16 by autocast, as its Trainer does.

    ``pure``: weights and moments in bfloat16 themselves. That is less work and another result, but 5.23.0 knows no
    other bfloat16: its experts stop under autocast ("self (Float) and source (BFloat16)").
    """

    def __init__(self, config: ModelConfig, dtype: str, rows: int, pure: bool = False) -> None:
        from transformers import DbrxConfig, DbrxForCausalLM

        raw = dbrx.FAMILY.config_to_hf(config)
        raw.pop("model_type"), raw.pop("architectures", None)
        if "rope_parameters" in inspect.signature(DbrxConfig.__init__).parameters:
            # transformers 5 does not read attn_config.rope_theta and would rotate with 10000.
            raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 500_000.0}
        self.model = DbrxForCausalLM._from_config(
            DbrxConfig(**{**raw, "output_router_logits": True, "use_cache": False}), attn_implementation="sdpa"
        )
        parameters = new_parameters(config, seed=0, std=0.02)
        from quadriga.io.parameters import to_stored
        from quadriga.kernels.arrays import array, tensor
        from quadriga.model.weight_map import source_shapes, whole

        pieces = next(iter(dbrx.FAMILY.layouts.values()))(config)
        stored = {name: torch.empty(shape) for name, shape in source_shapes(pieces).items()}
        for piece in pieces:
            box = piece.source_box or whole(piece.source_shape)
            target = piece.target_box or whole(piece.target_shape)
            values = parameters[piece.target][tuple(slice(*span) for span in target)]
            stored[piece.source][tuple(slice(*span) for span in box)] = tensor(to_stored(array(values), piece))
        self.model.load_state_dict(stored, strict=True)
        if pure:
            self.model.to(torch.bfloat16)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        self.ids = torch.tensor([ids for _, ids in documents(config.vocab_size, rows)])
        self.autocast = dtype == "bfloat16" and not pure

    def step(self) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())


def child(options: argparse.Namespace) -> None:
    """One side, timed; a JSON line on stdout. Under torchrun, one of its ranks: the batch is theirs together."""
    torch.set_num_threads(options.threads)
    if options.allocator:
        assert runtime.keep_freed_memory(), "this C library has no mallopt"
    config = architecture(options.vocab, options.n_experts)
    world = World.join("cpu") if "RANK" in os.environ else World()
    with devices.quick_float32(512 if options.side == "ours" else 0):
        peak = peak_flops(options.dtype, world)
        if options.side == "ours":
            side: Ours | Theirs = Ours(config, options.dtype, options.rows, world)
        else:
            side = Theirs(config, options.dtype, options.rows, options.pure)
        first, times = side.step(), []
        for _ in range(options.warmup):
            side.step()
        for _ in range(options.steps):
            started = time.perf_counter()
            side.step()
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    rss = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, dtype=torch.float64)
    result = {
        "first_loss": first,
        "seconds": seconds,
        "tokens_per_s": options.rows * 512 / seconds,
        "peak_gflops": peak / 1e9,
        "mfu": _flops(config, options.rows) / seconds / peak,
        "rss_gb": float(world.sum(rss)),
    }
    if world.first:
        print(json.dumps(result), flush=True)
    if world.size > 1:  # torch's gloo threads sometimes abort while the interpreter takes itself apart
        world.wait()
        os._exit(0)


def _flops(config: ModelConfig, rows: int) -> float:
    from quadriga.model.cost import attention_flops, n_params

    attention = attention_flops(config, 1) * rows * 512 * 513 / 2
    return 3.0 * (2 * n_params(config).active_without_input * rows * 512 + attention)


def measure(side: str, options: argparse.Namespace, **changes: Any) -> dict[str, float]:
    """A child process's result; ``newest`` among the changes is the folder of another transformers."""
    environment = {**os.environ, **({"PYTHONPATH": str(changes["newest"])} if "newest" in changes else {})}
    values = {**vars(options), **changes}
    command = [sys.executable, __file__, "child", "--side", side]
    if values.get("ranks", 1) > 1:
        command[1:2] = ["-m", "torch.distributed.run", "--nproc-per-node", str(values["ranks"]), __file__]
    for name in ("vocab", "dtype", "rows", "steps", "warmup", "threads", "n_experts"):
        command += [f"--{name.replace('_', '-')}", str(values[name])]
    command += [f"--{name}" for name in ("allocator", "pure") if values[name]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {side:>6} {changes or ''}: {found['tokens_per_s']:.0f} tokens/s, MFU {found['mfu']:.2f}", flush=True)
    return found


def record(rows: list[dict[str, Any]]) -> None:
    """Append to the results, with the commit and the machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    isa = next((name for name in ("avx512_bf16", "avx512f", "avx2") if name in runtime.cpu_flags()), "other")
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["commit", "machine", "isa", *rows[0]])
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({"commit": commit, "machine": runtime.cpu_name(), "isa": isa, **row})


def compare(options: argparse.Namespace, names: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Measure every variant in turn, ``rounds`` times; medians, recorded."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, (side, changes) in names.items():
            found[name].append(measure(side, options, **changes))
    medians = {}
    for name, runs in found.items():
        side, changes = names[name]
        medians[name] = {
            "variant": name,
            "vocab": changes.get("vocab", options.vocab),
            "dtype": changes.get("dtype", options.dtype),
            "threads": changes.get("threads", options.threads) * changes.get("ranks", 1),
            "rows": options.rows,
            "rounds": options.rounds,
            **{key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]},
        }
    record(list(medians.values()))
    return medians


def peers(options: argparse.Namespace) -> None:
    """Ours against transformers, with each allocator setting."""
    import transformers

    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {runtime.cpu_name()}")
    names = {
        "ours": ("ours", {"allocator": True}),
        "transformers": ("theirs", {"allocator": False}),
    }
    if options.same_allocator:
        names["transformers, same allocator"] = ("theirs", {"allocator": True})
    if options.newest:
        pure = options.dtype == "bfloat16"
        names["newest transformers"] = ("theirs", {"allocator": False, "newest": options.newest, "pure": pure})
    against(options, names)


def against(options: argparse.Namespace, names: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Measure, check that all begin at the same loss, print ratios to the first."""
    found = compare(options, names)
    ours = next(iter(found.values()))
    for name, row in found.items():
        gap = abs(ours["first_loss"] - row["first_loss"])
        assert gap < (1e-3 if options.dtype == "float32" else 5e-2), f"first losses differ by {gap}: {name}"
        print(
            f"{name:>30}: {row['tokens_per_s']:8.0f} tokens/s   MFU {row['mfu']:.2f}   {row['rss_gb']:.1f} GB   "
            f"ours is {ours['tokens_per_s'] / row['tokens_per_s']:.2f}x, "
            f"with {ours['rss_gb'] / row['rss_gb']:.2f} of its memory"
        )


def experts(options: argparse.Namespace) -> None:
    """16 and 64 experts against the dense network of equal active size."""
    common = {"vocab": 2048, "allocator": True}
    names = {
        "dense": ("ours", {**common, "n_experts": 0}),
        "16 experts": ("ours", {**common, "n_experts": 16}),
        "64 experts": ("ours", {**common, "n_experts": 64}),
    }
    found = compare(options, names)
    for name, row in found.items():
        share = row["tokens_per_s"] / found["dense"]["tokens_per_s"]
        print(f"{name:>12}: {row['tokens_per_s']:8.0f} tokens/s   MFU {row['mfu']:.2f}   {share:.2f} of dense")


def ranks(options: argparse.Namespace) -> None:
    """Ours on two ranks of one thread, and on one rank of two, against transformers on two threads."""
    names: dict[str, tuple[str, dict[str, Any]]] = {
        "ours, 2 ranks": ("ours", {"allocator": True, "threads": 1, "ranks": 2}),
        "ours, 2 threads": ("ours", {"allocator": True, "threads": 2}),
        "transformers": ("theirs", {"allocator": False, "threads": 2}),
        "transformers, same allocator": ("theirs", {"allocator": True, "threads": 2}),
    }
    against(options, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["peers", "experts", "ranks", "child"])
    parser.add_argument("--side", choices=["ours", "theirs"], default="ours")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=6, help="steps before the measured ones")
    parser.add_argument("--newest", type=Path, help="folder of another transformers, also measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=runtime.cpu_count())
    parser.add_argument("--n-experts", type=int, default=16)
    parser.add_argument("--allocator", action="store_true", help="keep freed memory (mallopt)")
    parser.add_argument("--pure", action="store_true", help="theirs with weights in bfloat16 too, not by autocast")
    parser.add_argument("--same-allocator", action="store_true", help="also transformers with our allocator setting")
    options = parser.parse_args()
    {"peers": peers, "experts": experts, "ranks": ranks, "child": child}[options.what](options)


if __name__ == "__main__":
    main()
