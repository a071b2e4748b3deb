"""gpt-oss from files that transformers 4.57.6 wrote, on the kernels and in torch; and as published, in MXFP4."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quadriga
from quadriga import SamplingParams
from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.convert import convert
from quadriga.io.dry_run import dry_run
from quadriga.io.open import open_checkpoint
from quadriga.io.packed import load_packed, read_matrix
from quadriga.io.parameters import to_stored
from quadriga.kernels import reference
from quadriga.kernels.arrays import array, tensor
from quadriga.model.weight_map import source_index, source_shapes, whole
from quadriga.nn.context import PackedContext
from quadriga.nn.load import load_parameters
from quadriga.nn.transformer import Transformer
from quadriga.runners.compiled import CompiledModel
from tests.batches import batch, logits_of

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 96, (41,), generator=torch.Generator().manual_seed(8)).tolist()
RAGGED = [TOKENS[3:36], TOKENS[:9], TOKENS[7:28]]
PREFILL = 17
BAR = 2e-5
"""Largest difference of a float32 logit, as a share of the logits' range."""


def hf_model(dtype: torch.dtype = torch.float32) -> Any:
    """All sizes differ; sinks, biases and gates are as large as what they are added to, so that limits are reached."""
    config = transformers.GptOssConfig(
        num_hidden_layers=4, num_local_experts=5, vocab_size=97, hidden_size=64, intermediate_size=96, head_dim=10,
        num_attention_heads=6, num_key_value_heads=2, sliding_window=7, rope_theta=1000.0, max_position_embeddings=128,
        num_experts_per_tok=3, eos_token_id=7, pad_token_id=96,  # torch gives padding no gradient
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.3, "truncate": False,
                      "original_max_position_embeddings": 16},
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.GptOssForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    sizes = {"norm": 0.2, "bias": 1.0, "sinks": 1.5, "gate_up_proj": 0.45, "embed_tokens.weight": 1.0}
    with torch.no_grad():
        for name, p in model.named_parameters():
            size = next((size for part, size in sizes.items() if part in name and "bias" not in name), 0.25)
            size = 1.0 if "bias" in name else size
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * size + ("norm" in name))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss")
    hf_model().save_pretrained(folder, max_shard_size="300KB")
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    model = hf_model()
    with torch.no_grad():
        cache = model(torch.tensor([TOKENS[:PREFILL]]), use_cache=True).past_key_values
        steps = [
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0]
            for token in TOKENS[PREFILL:]
        ]
        longest = max(map(len, RAGGED))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in RAGGED])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in RAGGED])
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        return {
            "prefill": model(torch.tensor([TOKENS]), use_cache=False).logits[0],
            "decode": torch.cat(steps),
            "ragged": torch.cat([padded[i, : len(row)] for i, row in enumerate(RAGGED)]),
        }


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


def compiled(path: Path, form: str = "float32") -> CompiledModel:
    checkpoint = open_checkpoint(path)
    packed = load_packed(checkpoint, form)
    checkpoint.close()
    return CompiledModel(checkpoint.config, packed.parameters, threads=2, n_blocks=12, kv_format="float32")


def logits(model: CompiledModel, rhythm: str) -> Tensor:
    blocks = [4, 0, 6]
    match rhythm:
        case "prefill":
            return logits_of(model, batch([(TOKENS, 0, blocks)]))
        case "decode":
            logits_of(model, batch([(TOKENS[:PREFILL], 0, blocks)]))
            steps = [logits_of(model, batch([([TOKENS[i]], i, blocks)])) for i in range(PREFILL, len(TOKENS))]
            return torch.cat(steps)
        case _:
            return logits_of(model, batch([(row, 0, [3 * i, 3 * i + 1, 3 * i + 2]) for i, row in enumerate(RAGGED)]))


@pytest.mark.parametrize("way", ["as saved", "through gguf", "through both"])
def test_the_kernels_compute_what_transformers_computes(
    saved: Path, expected: dict[str, Tensor], tmp_path: Path, way: str
) -> None:
    path = saved
    if way != "as saved":
        convert(saved, tmp_path / "one.gguf", to="gguf", gguf_format="float32")
        path = tmp_path / "one.gguf"
    if way == "through both":
        convert(path, tmp_path / "back", to="hf", max_shard_bytes=300_000)
        path = tmp_path / "back"
        stored = {n: t for file in sorted(saved.glob("*.safetensors")) for n, t in load_file(file).items()}
        again = {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}
        assert again.keys() == stored.keys() and all(torch.equal(again[n], stored[n]) for n in stored)
        assert transformers.AutoConfig.from_pretrained(path).to_dict().keys() >= {"layer_types", "rope_scaling"}
    model = compiled(path)
    for rhythm, theirs in expected.items():
        assert error(logits(model, rhythm), theirs) <= BAR, rhythm


def test_the_config_transformers_saves_and_dumps_is_the_same_model(saved: Path) -> None:
    from quadriga.model.families import config_from_hf, family_of

    raw = json.loads((saved / "config.json").read_text())
    config = config_from_hf(raw)
    assert [layer.mixer.window for layer in config.layers] == [7, None, 7, None]
    assert config_from_hf(transformers.AutoConfig.from_pretrained(saved).to_dict()) == config
    written = transformers.GptOssConfig(**family_of(config).config_to_hf(config))
    assert config_from_hf(written.to_dict()) == config


# --- what the comparison above can see


def unclamped_gate(gate: Tensor, up: Tensor, _: str) -> Tensor:
    return (up.clamp(-7, 7) + 1) * gate * torch.sigmoid(1.702 * gate)


def unclamped_up(gate: Tensor, up: Tensor, _: str) -> Tensor:
    gate = gate.clamp(max=7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def without_one(gate: Tensor, up: Tensor, _: str) -> Tensor:
    gate = gate.clamp(max=7)
    return up.clamp(-7, 7) * gate * torch.sigmoid(1.702 * gate)


def usual_slope(gate: Tensor, up: Tensor, _: str) -> Tensor:
    gate = gate.clamp(max=7)
    return (up.clamp(-7, 7) + 1) * gate * torch.sigmoid(gate)


LEFT_OUT = [
    "attn.sinks", "attn.wqkv.bias", "attn.wo.bias", "moe.router.bias", "moe.b_gate", "moe.b_up", "moe.b_down",
]  # fmt: skip


def in_torch(path: Path, change: Callable[[dict[str, Tensor]], None] = lambda _: None) -> Tensor:
    checkpoint = open_checkpoint(path)
    values = load_parameters(checkpoint)
    checkpoint.close()
    change(values)
    model = Transformer.from_parameters(checkpoint.config, values).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS), PackedContext([len(TOKENS)])).logits


@pytest.mark.parametrize("name", LEFT_OUT)
def test_every_bias_left_out_is_seen(saved: Path, expected: dict[str, Tensor], name: str) -> None:
    def leave_out(values: dict[str, Tensor]) -> None:
        # A sink of -1e9 is none.
        values[f"layers.1.{name}"] = torch.full_like(values[f"layers.1.{name}"], -1e9 if "sinks" in name else 0.0)

    assert error(in_torch(saved), expected["prefill"]) <= BAR
    assert error(in_torch(saved, leave_out), expected["prefill"]) > 100 * BAR


@pytest.mark.parametrize("wrong", [unclamped_gate, unclamped_up, without_one, usual_slope])
def test_every_part_of_the_unit_left_out_is_seen(
    saved: Path, expected: dict[str, Tensor], wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quadriga.kernels import ops

    monkeypatch.setattr(reference, "gated", wrong)
    with ops.use("reference"):
        assert error(in_torch(saved), expected["prefill"]) > 100 * BAR


def test_gradients_are_those_of_transformers(saved: Path) -> None:
    """Every parameter's, through the weight map backwards: a gradient is stored as its parameter is."""
    theirs = hf_model(torch.float64)
    ids = torch.tensor(TOKENS)
    logits = theirs(ids[None], use_cache=False).logits[0]
    (-logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).mean()).backward()
    checkpoint = open_checkpoint(saved)
    values = {n: t.double() for n, t in load_parameters(checkpoint).items()}
    ours = Transformer.from_parameters(checkpoint.config, values)
    logits = ours(ids, PackedContext([len(TOKENS)])).logits
    (-logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).mean()).backward()
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    stored = {n: torch.zeros(s, dtype=torch.float64) for n, s in source_shapes(checkpoint.pieces).items()}
    for piece in checkpoint.pieces:
        grad = gradients[piece.target]
        assert grad is not None
        part = grad[tuple(slice(*span) for span in piece.target_box or whole(piece.target_shape))]
        stored[piece.source][source_index(piece)] = tensor(to_stored(array(part), piece))
    assert stored.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        assert float((stored[name] - p.grad).abs().max()) <= 1e-5 * float(p.grad.abs().max()), name


# --- MXFP4


def published(folder: Path, saved: Path) -> dict[str, Tensor]:
    """The saved model as the release stores it, experts in random codes; and what transformers makes of those."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = {n: t for file in sorted(saved.glob("*.safetensors")) for n, t in load_file(file).items()}
    plain: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(6)
    for name in [n for n in tensors if n.endswith("_proj") and "experts" in n]:
        e, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (e, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 124, (e, rows, columns // 32), generator=generator, dtype=torch.uint8)
        plain[name] = convert_moe_packed_tensors(blocks, scales)
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
    tensors = {n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in tensors.items()}
    names, table = list(tensors), {}
    for shard in range(3):
        mine = names[shard::3]
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        save_file({n: tensors[n].contiguous() for n in mine}, folder / file)
        table |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    raw = json.loads((saved / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(raw))
    return plain | {n: t for n, t in tensors.items() if t.dtype == torch.bfloat16}


def test_the_release_is_read_to_the_bit_and_written_as_bfloat16(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    theirs = published(tmp_path / "release", saved)
    checkpoint = open_checkpoint(tmp_path / "release")
    assert checkpoint.layout == "mxfp4"
    ours = load_parameters(checkpoint)
    experts = "model.layers.2.mlp.experts."
    assert ours["layers.2.moe.w_gate"].dtype == torch.bfloat16
    assert torch.equal(ours["layers.2.moe.w_gate"], theirs[experts + "gate_up_proj"][..., 0::2].mT)
    assert torch.equal(ours["layers.2.moe.w_up"], theirs[experts + "gate_up_proj"][..., 1::2].mT)
    assert torch.equal(ours["layers.2.moe.w_down"], theirs[experts + "down_proj"].mT)
    part = checkpoint.parameters.read("layers.2.moe.w_down", ((1, 3), (5, 9), (7, 77)))
    assert np.array_equal(part, array(ours["layers.2.moe.w_down"][1:3, 5:9, 7:77]))
    checkpoint.close()
    convert(tmp_path / "release", tmp_path / "hf", to="hf")
    back = load_file(tmp_path / "hf" / "model.safetensors")
    assert back.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(back[name], values) and back[name].dtype == torch.bfloat16, name
    with pytest.raises(ConfigError, match="the layout mxfp4 is read and not written"):
        convert(tmp_path / "release", tmp_path / "again", to="hf", layout="mxfp4")


@pytest.mark.parametrize("form", ["keep", "mx4", "q8"])
def test_the_release_is_packed_without_loss(saved: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "release").mkdir()
    published(tmp_path / "release", saved)
    checkpoint = open_checkpoint(tmp_path / "release")
    plain = load_parameters(checkpoint)
    kept = load_packed(checkpoint, form).parameters
    convert(tmp_path / "release", tmp_path / "packed", format=form)
    written = open_checkpoint(tmp_path / "packed")
    for name in ("layers.0.moe.w_gate", "layers.2.moe.w_up", "layers.3.moe.w_down"):
        experts = kept[name]
        assert isinstance(experts, list) and {one.format for one in experts} == {"q8" if form == "q8" else "mx4"}
        for expert, one in enumerate(experts):
            assert np.array_equal(one.unpack(), plain[name][expert].float().numpy()), name
        assert np.array_equal(written.parameters.read(name), plain[name].float().numpy())


def test_the_release_stays_in_4_bits_through_gguf(saved: Path, tmp_path: Path) -> None:
    """GGUF's own MXFP4 holds the experts' numbers, and is packed as the release itself is."""
    (tmp_path / "release").mkdir()
    published(tmp_path / "release", saved)
    convert(tmp_path / "release", tmp_path / "one.gguf", to="gguf", gguf_format="mxfp4")
    released, through = open_checkpoint(tmp_path / "release"), open_checkpoint(tmp_path / "one.gguf")
    for name in ("layers.1.moe.w_gate", "layers.3.moe.w_down"):
        numbers = released.parameters.read(name).astype(np.float32)
        assert np.array_equal(through.parameters.read(name), numbers)
        for form in ("mx4", "q8"):
            assert np.array_equal(read_matrix(through, name, 4, form).pack(form).unpack(), numbers[4]), form
    kept = load_packed(through).parameters["layers.0.moe.w_up"]
    assert isinstance(kept, list) and {one.format for one in kept} == {"mx4"}
    # As in llama.cpp's MXFP4_MOE, attention is not cut to 4 bits; rows of no whole blocks are float16.
    stored = {name: info.dtype for name, info in through.source.tensors.items() if "attn" in name and "weight" in name}
    assert stored["blk.0.attn_k.weight"] == "q8_0" and "mxfp4" not in stored.values()


def test_the_release_answers(saved: Path, tmp_path: Path) -> None:
    """Opened by its path alone: its experts stay in 4 bits, and the logits are those of its numbers in float32."""
    published(tmp_path, saved)
    model = quadriga.load(tmp_path, kv_format="float32")
    right = logits(compiled(tmp_path), "prefill")
    assert error(torch.from_numpy(np.asarray(model.logits(TOKENS))), right) < 0.02
    done = model.generate(TOKENS[:5], SamplingParams(max_new_tokens=4, ignore_eos=True))
    assert len(done.token_ids) == 4


def test_the_release_on_the_kernels_is_the_same_numbers_in_float32(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    published(tmp_path / "release", saved)
    convert(tmp_path / "release", tmp_path / "hf", to="hf", dtype="float32")
    one, two = (logits(compiled(tmp_path / name), "prefill") for name in ("release", "hf"))
    assert torch.equal(one, two)


@pytest.mark.parametrize(("scale", "loss"), [(90, 2**-25), (103, 2**-25), (144, None)])
def test_scales_that_float16_has_not_are_rounded_or_refused(
    saved: Path, tmp_path: Path, scale: int, loss: float | None
) -> None:
    published(tmp_path, saved)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    (shard,) = (f for f in tmp_path.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(shard)
    tensors[name][3, 7, 1] = scale
    save_file(tensors, shard)
    checkpoint = open_checkpoint(tmp_path)
    plain = checkpoint.parameters.read("layers.1.moe.w_down", ((3, 4), (0, 64), (0, 96)))[0].astype(np.float32)
    for form in ("mx4", "q8"):
        if loss is None and form == "mx4":
            with pytest.raises(CheckpointError, match=r"layers.1.moe.w_down: .*row 7 is not"):
                read_matrix(checkpoint, "layers.1.moe.w_down", 3, form).pack(form)
            continue
        got = read_matrix(checkpoint, "layers.1.moe.w_down", 3, form).pack(form).unpack()
        assert np.abs(got - plain).max() <= (loss or 0) * (2 if form == "mx4" else 1)


def test_bytes_that_are_no_mxfp4_are_named(saved: Path, tmp_path: Path) -> None:
    published(tmp_path, saved)
    assert dry_run(tmp_path).layout == "mxfp4"
    (shard,) = tmp_path.glob("model-00001-*")
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("_scales"))
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, shard)
    with pytest.raises(CheckpointError, match=r"_blocks must have 16 bytes for each number of _scales"):
        open_checkpoint(tmp_path)
    table = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del table["weight_map"][name]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(table))
    save_file({n: t for n, t in tensors.items() if n != name}, shard)
    with pytest.raises(CheckpointError, match="is of bytes, which are weights only as MXFP4"):
        open_checkpoint(tmp_path)


def test_a_release_without_its_shards_is_mapped_by_names(saved: Path, tmp_path: Path) -> None:
    published(tmp_path, saved)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    report = dry_run(tmp_path)
    assert (report.layout, report.n_files, report.files_present) == ("mxfp4", 3, 0)
