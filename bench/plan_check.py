"""The planner against training measured on this machine: bytes saved for the backward pass, and time of a step.

    python bench/plan_check.py            one thread, float32; a minute

Saved bytes are counted by autograd's own hooks, each storage once, parameters and inputs left out. The plan's time
takes this machine's measured matrix-product peak, memory bandwidth and attention rate; nothing is fitted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from quadriga import runtime
from quadriga.model.config import AttentionSpec, DenseSpec, ModelConfig, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.model.parallel_spec import ParallelSpec
from quadriga.model.plan.hardware import Gpu, Stack
from quadriga.model.plan.training import Work, activation_elements, evaluate
from quadriga.nn import devices
from quadriga.nn.transformer import Transformer
from quadriga.train.batch import TrainingBatch
from quadriga.train.config import RouterSection
from quadriga.train.initialise import new_parameters
from quadriga.train.losses import NextToken
from quadriga.train.memory_source import MemorySource
from quadriga.train.run import peak_flops
from quadriga.train.world import World

SEQ_LEN, ROWS, VOCAB = 512, 4, 8192


def architecture(d_model: int, n_layers: int, n_experts: int) -> ModelConfig:
    """DBRX's shape in small; ``n_experts`` 0 is dense, of equal active size."""
    d_ff = d_model * 7 // 4
    ffn: MoESpec | DenseSpec = DenseSpec(d_ff=4 * d_ff, activation="silu")
    if n_experts:
        ffn = MoESpec(d_ff=d_ff, n_experts=n_experts, top_k=4, activation="silu", aux_loss_weight=0.05)
    return uniform_model(
        family="dbrx" if n_experts else "llama2",
        vocab_size=VOCAB,
        d_model=d_model,
        n_layers=n_layers,
        max_seq_len=SEQ_LEN,
        norm=NormSpec(kind="layer"),
        mixer=AttentionSpec(
            n_heads=d_model // 64, n_kv_heads=max(1, d_model // 128), head_dim=64, position=RopeSpec(theta=500_000.0)
        ),
        ffn=ffn,
    )


def fastest(run: Callable[[], object], repeat: int) -> float:
    """Seconds of the quickest of some runs."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def saved_bytes(config: ModelConfig, model: Transformer, batch: TrainingBatch) -> int:
    """Bytes of distinct storages that a forward pass keeps, besides parameters and the batch."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    known |= {tensor.untyped_storage().data_ptr() for tensor in (batch.tokens, batch.targets, batch.positions)}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = NextToken(config, RouterSection(), World())(model, batch)
    total = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return total


def this_machine(config: ModelConfig) -> Gpu:
    """One thread of this processor, measured."""
    peak = peak_flops("float32", World())
    block = torch.zeros(64 << 20)
    copied = 2 * block.nbytes / fastest(block.clone, 3)
    heads, dim = config.layers[0].mixer.n_heads, config.layers[0].mixer.head_dim
    q = torch.randn(ROWS, heads, SEQ_LEN, dim)
    attend = torch.nn.functional.scaled_dot_product_attention
    rate = 2 * ROWS * heads * dim * SEQ_LEN**2 / fastest(lambda: attend(q, q, q, is_causal=True), 5)
    return Gpu(
        name="this processor",
        memory_bytes=2**40,
        peak_flops=peak,
        hbm_bytes_per_s=copied,
        node_bytes_per_s=1.0,
        network_bytes_per_s=1.0,
        per_node=1,
        gemm=1.0,
        attention=min(1.0, rate / peak),
        price_per_hour=0.0,
    )


def main() -> None:
    """Measure and print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{runtime.cpu_name()}, one thread, float32; {ROWS} rows of {SEQ_LEN} tokens")
    print("model                     saved MB  plan MB  ratio    step s  plan s  ratio")
    with devices.quick_float32(ROWS * SEQ_LEN):
        for d_model, n_layers, n_experts in ((256, 8, 0), (256, 8, 16), (512, 4, 16)):
            config = architecture(d_model, n_layers, n_experts)
            model = Transformer.from_parameters(config, new_parameters(config, seed=0, std=0.02))
            ids = torch.randint(VOCAB, (ROWS * SEQ_LEN + 1,), generator=torch.Generator().manual_seed(0)).tolist()
            batch = MemorySource([("x", ids)], n_rows=ROWS, seq_len=SEQ_LEN).rows(0, 0, ROWS)
            tokens = ROWS * SEQ_LEN
            kept = saved_bytes(config, model, batch)
            planned = 4 * tokens * n_layers * sum(activation_elements(config.layers[0], d_model)) + 4 * tokens * d_model
            objective = NextToken(config, RouterSection(), World())
            times = []
            for _ in range(options.steps):
                started = time.perf_counter()
                objective(model, batch)[0].backward()
                times.append(time.perf_counter() - started)
                model.zero_grad(set_to_none=False)
            gpu = this_machine(config)
            work, stack = Work(SEQ_LEN, ROWS, 1, "none"), Stack("measured", 1.0, 1.0, 0.0)
            plan = evaluate(config, gpu, ParallelSpec(1, 1, 1), work, stack)
            expected = plan.time.matrix + plan.time.attention + 2 * plan.time.passes  # passes are in bfloat16 there
            took = statistics.median(times)
            name = f"d {d_model}, {n_layers} layers, {n_experts or 'no'} experts"
            print(
                f"{name:26}{kept / 1e6:8.1f} {planned / 1e6:8.1f} {planned / kept:6.2f}  "
                f"{took:8.3f} {expected:7.3f} {expected / took:6.2f}"
            )


if __name__ == "__main__":
    main()
