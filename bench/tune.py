"""A LoRA step beside peft + transformers: same weights, same tokens, same factors' shapes, alternating in one run.

    python bench/tune.py dense smollm2-135m-instruct        rank 8 on attention and feed-forward
    python bench/tune.py experts runs/smol-moe              rank 8 on every expert

Both sides take cross-entropy over the same packed rows (one document a row), backward, and an AdamW step, in float32 on
one thread count. ``experts`` compares one mixture layer, forwards and backwards: ours against peft's way for fused
stacks (``target_parameters``: W + s B A is materialised, then the layer runs on it).
Prints medians, tokens a second, the ratio, and each side's peak resident memory (a process a side).
"""

from __future__ import annotations

import argparse
import copy
import gc
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from quadriga import runtime
from quadriga.hub import catalogue
from quadriga.io import convert
from quadriga.io.open import open_checkpoint
from quadriga.kernels.arrays import tensor
from quadriga.model.adapter_spec import LoraSpec
from quadriga.model.config import MoESpec
from quadriga.nn import devices
from quadriga.nn.linear import Factors, adapt
from quadriga.nn.load import load_parameters
from quadriga.nn.lora import attach
from quadriga.nn.moe import MoE
from quadriga.nn.transformer import Transformer
from quadriga.train.batch import IGNORE
from quadriga.train.chat_data import Example
from quadriga.train.config import RouterSection
from quadriga.train.losses import NextToken
from quadriga.train.packing import ExampleSource
from quadriga.train.world import World

RANK, ALPHA = 8, 16.0


def ours(path: Path, ids: Tensor) -> Callable[[], float]:
    """A step of ours; returns its loss."""
    runtime.keep_freed_memory()
    checkpoint = open_checkpoint(path)
    model = Transformer.from_parameters(checkpoint.config, load_parameters(checkpoint, dtype=torch.float32))
    made = attach(model, LoraSpec(rank=RANK, alpha=ALPHA, targets=("attention", "ffn")))
    documents = [(Example(tuple(row), (*row[1:], IGNORE)),) for row in ids.tolist()]
    source = ExampleSource(documents, ("text",), n_rows=len(ids), seq_len=ids.shape[1])
    objective = NextToken(checkpoint.config, RouterSection(), World())
    optimiser = torch.optim.AdamW([p for one in made.values() for p in (one.a, one.b)], lr=1e-4, fused=True)
    batch = source.rows(0, 0, len(ids))
    model.train()

    def step() -> float:
        loss, _ = objective(model, batch)
        (loss / batch.target_weight()).backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach()) / batch.target_weight()

    return step


def theirs(path: Path, ids: Tensor) -> Callable[[], float]:
    """The same by transformers and peft."""
    import peft
    import transformers

    folder = Path(tempfile.mkdtemp()) / "hf"
    convert.convert(path, folder, to="hf", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets)).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step


def layer(path: Path, n_tokens: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """(ours, peft's way) of one adapted mixture layer, forwards and backwards."""
    checkpoint = open_checkpoint(path)
    spec = checkpoint.config.only_moe("the adapted layer")
    assert isinstance(spec, MoESpec), "a mixture of experts"
    moe = MoE(checkpoint.config.d_model, spec)
    prefix = f"layers.{checkpoint.config.n_layers // 2}.moe."
    moe.load_state_dict({n: tensor(checkpoint.parameters.read(prefix + n)).float() for n in moe.state_dict()})
    moe.requires_grad_(False)
    lora = LoraSpec(rank=RANK, alpha=ALPHA, targets=("experts",))
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for name in ("w_gate", "w_up", "w_down"):
        e, out, columns = getattr(moe, name).shape
        a, b = torch.randn(e, RANK, columns, generator=generator), torch.randn(e, out, RANK, generator=generator)
        pairs[name] = (a * 0.02, b * 0.02)
    x = torch.randn(n_tokens, checkpoint.config.d_model, generator=generator).requires_grad_()
    weights = {name: getattr(moe, name) for name in pairs}
    adapted = copy.copy(moe)
    adapted._parameters = dict(moe._parameters)
    adapted._modules = dict(moe._modules)
    for name, (a, b) in pairs.items():
        adapt(adapted, name, Factors(a.clone(), b.clone(), scale=lora.scale))
    plain = {name: tuple(t.clone().requires_grad_() for t in ab) for name, ab in pairs.items()}

    def low_rank() -> float:
        out = adapted(x)[0]
        out.square().mean().backward()
        return float(out.detach().square().mean())

    def materialised() -> float:
        full = {n: weights[n] + lora.scale * torch.einsum("eor,eri->eoi", b, a) for n, (a, b) in plain.items()}
        out = torch.func.functional_call(moe, full, (x,))[0]
        out.square().mean().backward()
        return float(out.detach().square().mean())

    return low_rank, materialised


def measure(sides: dict[str, Callable[[], float]], n_tokens: int, repeats: int) -> None:
    """Alternate, and print."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    values: dict[str, float] = {}
    for name, side in sides.items():
        values[name] = side()  # warm-up, and the result to compare
    for _ in range(repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - started)
    first, second = (statistics.median(times[name]) for name in sides)
    for name in sides:
        median = statistics.median(times[name])
        spread = (max(times[name]) - min(times[name])) / median
        print(f"{name}: {n_tokens / median:.1f} tokens/s, median {median:.3f} s of {repeats}, spread {spread:.0%}, "
              f"value {values[name]:.5f}")  # fmt: skip
    print(f"ratio {second / first:.2f}")


def main() -> None:
    """Parse, build both sides, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("dense", "experts"))
    parser.add_argument("model")
    parser.add_argument("--side", choices=("ours", "theirs"), help="one side only, to see its memory")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    devices.set_threads(args.threads)
    path = catalogue.resolve(args.model)
    n = args.rows * args.seq_len
    print(" ".join(sys.argv), "|", runtime.cpu_name(), "| torch", torch.__version__)
    if args.what == "experts":
        low_rank, materialised = layer(path, n)
        measure({"ours": low_rank, "materialised": materialised}, n, args.repeats)
        return
    tokenizer = open_checkpoint(path).load_tokenizer(catalogue.cl100k_ranks)
    assert tokenizer is not None, "a model with a vocabulary"
    ids = torch.randint(100, tokenizer.n_vocab, (args.rows, args.seq_len), generator=torch.Generator().manual_seed(1))
    builders = {"ours": ours, "theirs": theirs}
    sides = {name: build(path, ids) for name, build in builders.items() if args.side in (None, name)}
    gc.collect()
    if args.side:
        side = sides[args.side]
        side()
        before = time.perf_counter()
        side()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{args.side}: {n / (time.perf_counter() - before):.1f} tokens/s, peak {peak:.2f} GB")
        return
    with devices.quick_float32(n):
        measure(sides, n, args.repeats)


if __name__ == "__main__":
    main()
