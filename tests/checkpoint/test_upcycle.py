"""Upcycling keeps the function; its options change it as in their papers; pruning and merging equal naive sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quadriga.edits.calibrate import calibrate
from quadriga.edits.fewer_experts import merge_experts, prune, usefulness
from quadriga.edits.upcycle import Upcycling, upcycle
from quadriga.errors import ConfigError
from quadriga.io import convert
from quadriga.io.open import Checkpoint, open_checkpoint
from quadriga.kernels.arrays import array, tensor
from quadriga.model.weight_map import parameter_shapes
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer, random_parameters
from tests.checkpoint.models import TINY, write_hf
from tests.configs import changed

HOW = Upcycling(n_experts=6, top_k=2)
IDS = torch.randint(0, 97, (41,), generator=torch.Generator().manual_seed(3))


def opened(folder: Path, name: str = "llama2-tied", **changes: object) -> Checkpoint:
    config = changed(TINY[name], **changes)
    write_hf(folder, config, parameters=random_parameters(config, std=0.2))
    return open_checkpoint(folder)


def read(checkpoint: Checkpoint, name: str) -> Tensor:
    return tensor(checkpoint.parameters.read(name))


def logits(checkpoint: Checkpoint) -> Tensor:
    model = Transformer.from_parameters(checkpoint.config, load_parameters(checkpoint, dtype=torch.float32)).eval()
    with torch.inference_mode():
        return model(IDS, PackedContext([17, 24])).logits


@pytest.mark.parametrize("name", ["llama2", "llama2-tied", "qwen3"])
@pytest.mark.parametrize(("top_k", "granules"), [(2, None), (4, 2), (2, 1), (1, 1)])
def test_the_mixture_computes_what_the_dense_model_does(
    tmp_path: Path, name: str, top_k: int, granules: int | None
) -> None:
    dense = opened(tmp_path / "dense", name)
    moe = upcycle(dense, Upcycling(n_experts=8, top_k=top_k, granules=granules, router_std=0.5))
    assert moe.config.family == ("qwen3moe" if name == "qwen3" else "mixtral")
    assert moe.config.only_moe("this test").d_ff * (granules or top_k) == dense.config.layers[0].ffn.d_ff
    wanted = logits(dense)
    # Sums in another order: a few roundings of the logits' own size.
    torch.testing.assert_close(logits(moe), wanted, rtol=0, atol=2e-5 * float(wanted.std()))


@pytest.mark.parametrize("granules", [1, 2, 3, 5, 8])
def test_a_bfloat16_model_keeps_its_function_at_any_number_of_granules(tmp_path: Path, granules: int) -> None:
    """3 w has more digits than bfloat16: it is stored in float32; 2 w has w's own, and is stored as w is."""
    config = changed(TINY["llama2-tied"], ffn=replace(TINY["llama2-tied"].layers[0].ffn, d_ff=120))
    random = random_parameters(config, std=0.2)
    write_hf(tmp_path, config, parameters={n: p.to(torch.bfloat16) for n, p in random.items()})
    dense = open_checkpoint(tmp_path)
    moe = upcycle(dense, Upcycling(n_experts=2 * granules, top_k=granules, router_std=0.5))
    wanted = logits(dense)
    torch.testing.assert_close(logits(moe), wanted, rtol=0, atol=2e-5 * float(wanted.std()))
    stored = read(moe, "layers.0.moe.w_down").dtype
    assert stored == (torch.float32 if granules in (3, 5) else torch.bfloat16)


def test_tokens_visit_whole_copies_and_not_all_the_same(tmp_path: Path) -> None:
    moe = upcycle(opened(tmp_path / "dense"), Upcycling(n_experts=6, top_k=2, router_std=0.5))
    model = Transformer.from_parameters(moe.config, load_parameters(moe)).eval()
    stats = model(IDS, PackedContext([len(IDS)]), with_stats=True).router_stats
    for layer in stats:
        pairs = layer.expert_ids.sort(-1).values
        assert torch.equal(pairs[:, 0] % 2, torch.zeros(len(IDS), dtype=torch.int64))
        assert torch.equal(pairs[:, 1], pairs[:, 0] + 1), "granules 0 and 1 of one copy"
        torch.testing.assert_close(layer.expert_weights, torch.full((len(IDS), 2), 0.5), rtol=0, atol=1e-6)
    assert len({int(e) for layer in stats for e in layer.expert_ids.unique()}) == 6
    first, second = (read(moe, f"layers.{layer}.moe.router.weight") for layer in (0, 1))
    assert not torch.equal(first, second), "every layer has a router of its own"


def test_given_routers_are_the_rows_of_their_copies(tmp_path: Path) -> None:
    dense = opened(tmp_path / "dense")
    routers = {layer: array(torch.randn(3, 48)) for layer in range(3)}
    moe = upcycle(dense, HOW, routers=routers)
    for layer in range(3):
        stored = read(moe, f"layers.{layer}.moe.router.weight")
        assert torch.equal(stored, tensor(routers[layer])[[0, 0, 1, 1, 2, 2]])
    assert moe.recipe != upcycle(dense, HOW, routers={i: r + 1 for i, r in routers.items()}).recipe
    with pytest.raises(ConfigError, match=r"layer 2 needs router rows \(3, 48\)"):
        upcycle(dense, HOW, routers={0: routers[0], 1: routers[1]})


def test_drop_redraws_the_same_units_of_gate_up_and_down(tmp_path: Path) -> None:
    dense = opened(tmp_path / "dense")
    plain, dropped = upcycle(dense, HOW), upcycle(dense, replace(HOW, drop=0.25))
    name = "layers.1.moe.{}"
    changed = []
    for part, axis in (("w_gate", 1), ("w_up", 1), ("w_down", 0)):
        a, b = read(plain, name.format(part))[4], read(dropped, name.format(part))[4]
        changed.append(~(a == b).all(axis))
        assert (a != b).any(axis).sum() == 10, "a quarter of 40 units"
        assert abs(float(b.std() / a.std()) - 1) < 0.1
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
    others = read(dropped, name.format("w_up"))[2] != read(plain, name.format("w_up"))[2]
    assert not torch.equal(others.any(1), changed[1]), "every expert has units of its own"


def test_noise_has_the_size_asked_for(tmp_path: Path) -> None:
    dense = opened(tmp_path / "dense")
    a = read(upcycle(dense, HOW), "layers.0.moe.w_up")
    b = read(upcycle(dense, replace(HOW, noise=0.05)), "layers.0.moe.w_up")
    # 1920 samples: the estimate of a deviation is within 5 standard errors, 5 / sqrt(2 * 1920) = 8 %.
    assert torch.allclose((b - a).std(dim=(1, 2)) / a.std(dim=(1, 2)), torch.tensor(0.05), rtol=0.08)
    assert not torch.equal((b - a)[0], (b - a)[2])


@pytest.mark.parametrize("name", ["llama2", "qwen3"])
def test_written_as_hf_gguf_and_packed_it_reads_back(tmp_path: Path, name: str) -> None:
    dense = opened(tmp_path / "dense", name, eos_ids=(7,), bos_id=1)
    moe = upcycle(dense, HOW)
    wanted = logits(moe)
    convert.write(moe, tmp_path / "hf", to="hf")
    convert.write(moe, tmp_path / "gguf.gguf", to="gguf", gguf_format="float32")
    convert.write(moe, tmp_path / "own")
    convert.write(moe, tmp_path / "packed", format="float32")
    for path in ("hf", "gguf.gguf", "own", "packed"):
        again = open_checkpoint(tmp_path / path)
        spec = again.config.only_moe("this test")
        assert spec == replace(moe.config.only_moe("this test"), aux_loss_weight=spec.aux_loss_weight)
        assert torch.equal(logits(again), wanted), path


@pytest.mark.parametrize("name", ["llama2", "qwen3"])
def test_merging_right_after_upcycling_gives_the_dense_model_back(tmp_path: Path, name: str) -> None:
    dense = opened(tmp_path / "dense", name)
    convert.write(upcycle(dense, HOW), tmp_path / "moe")
    back = merge_experts(open_checkpoint(tmp_path / "moe"), use=[[3, 1, 4, 1, 5, 9]] * 3)
    assert back.config == dense.config
    for name in ("layers.2.ffn.w_gate", "layers.0.ffn.w_down", "layers.1.attn.wqkv.weight"):
        torch.testing.assert_close(read(back, name), read(dense, name), rtol=1e-6, atol=0)


def test_merging_weighs_copies_by_use(tmp_path: Path) -> None:
    moe = opened(tmp_path / "moe", "mixtral", ffn=replace(TINY["mixtral"].layers[0].ffn, n_experts=4, top_k=2))
    use = [[1.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    dense = merge_experts(moe, 2, use=use)
    for layer, (a, b, c, d) in enumerate([(0.25, 0.5, 0.75, 0.5), (0.5,) * 4, (0.5,) * 4]):
        stored = read(moe, f"layers.{layer}.moe.w_down")
        wanted = torch.cat((a * stored[0] + c * stored[2], b * stored[1] + d * stored[3]), 1) / 2
        torch.testing.assert_close(read(dense, f"layers.{layer}.ffn.w_down"), wanted)


def test_use_and_output_are_what_a_loop_over_tokens_adds_up(tmp_path: Path) -> None:
    moe = opened(tmp_path / "moe", "mixtral")
    found = calibrate(moe, IDS.tolist())
    model = Transformer.from_parameters(moe.config, load_parameters(moe)).eval()
    inputs: list[Tensor] = []
    block = model.layers[1].moe
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(IDS, PackedContext([len(IDS)]))
    ids, weights, _, _ = block.router(inputs[0])
    wanted = torch.zeros(5)
    for x, chosen, weight in zip(inputs[0], ids, weights, strict=True):
        for e, w in zip(chosen.tolist(), weight.tolist(), strict=True):
            y = block.w_down[e] @ (torch.nn.functional.silu(block.w_gate[e] @ x) * (block.w_up[e] @ x))
            wanted[e] += w * y.norm()
    torch.testing.assert_close(torch.tensor(usefulness(found)[1]), wanted, rtol=1e-4, atol=0)
    assert usefulness(found, "use")[1] == torch.bincount(ids.reshape(-1), minlength=5).tolist()


def test_pruning_leaves_out_the_least_useful(tmp_path: Path) -> None:
    moe = opened(tmp_path / "moe", "mixtral")
    worth = [[5.0, 1.0, 2.0, 0.5, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.1, 0.2, 0.3, 0.4]]
    small = prune(moe, 4, worth)
    assert small.config == moe.config.with_ffn(n_experts=4)
    for layer, kept in enumerate([[0, 1, 2, 4], [0, 1, 2, 3], [1, 2, 3, 4]]):
        for part in ("w_gate", "w_down", "router.weight"):
            name = f"layers.{layer}.moe.{part}"
            assert torch.equal(read(small, name), read(moe, name)[kept])
    assert logits(small).isfinite().all()
    with pytest.raises(ConfigError, match="between top_k=3 and the model's 5; got 2"):
        prune(moe, 2, worth)


@pytest.mark.parametrize(
    "name", ["dbrx", "qwen2moe", "minimax-m2", "hunyuan-moe", "granitemoeshared", "phimoe", "grok1"]
)
def test_pruning_changes_what_each_expert_has_and_nothing_else(tmp_path: Path, name: str) -> None:
    """Shared networks and their gates, norms and attention stay; router rows and corrections go with their experts."""
    moe = opened(tmp_path / "moe", name)
    n = moe.config.only_layer("this").moe.n_experts
    small = prune(moe, n - 1, [[float((e + layer) % n) for e in range(n)] for layer in range(moe.config.n_layers)])
    cut = set()
    for part in parameter_shapes(small.config):
        before, after = read(moe, part), read(small, part)
        if after.shape != before.shape:
            cut.add(part.split(".", 3)[-1])
            before = before[[e for e in range(n) if (e + int(part.split(".")[1])) % n]]
        assert torch.equal(after, before), part
    assert (
        {"router.weight", "w_up", "w_down"} <= cut <= {"router.weight", "router.correction", "w_up", "w_gate", "w_down"}
    )


def test_sizes_that_do_not_divide_and_foreign_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="granules must divide n_experts and top_k"):
        Upcycling(n_experts=16, top_k=4, granules=3)
    with pytest.raises(ConfigError, match="granules must divide d_ff: got d_ff=80, granules=3"):
        upcycle(opened(tmp_path / "a"), Upcycling(n_experts=6, top_k=3))
    with pytest.raises(ConfigError, match="family mpt"):
        upcycle(opened(tmp_path / "b", "mpt"), HOW)
    with pytest.raises(ConfigError, match="of the family olmoe, whose dense counterpart"):
        merge_experts(opened(tmp_path / "d", "olmoe"), 1)
    with pytest.raises(ConfigError, match="has no experts"):
        merge_experts(opened(tmp_path / "c"))
