"""Packed directories: the same model as packing at load, resumable, provable, and experts that stay on disk."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io import conversion_writer
from quadriga.io import directory as engine_file
from quadriga.io import packed as packed_module
from quadriga.io.convert import convert
from quadriga.io.open import open_checkpoint
from quadriga.io.packed import PackedParameters, load_packed
from quadriga.kernels.cpu.packing import Packed
from quadriga.model.config import AttentionSpec, DenseSpec, ModelConfig, NormSpec, RopeSpec, uniform_model
from quadriga.nn.load import load_parameters
from quadriga.runners.compiled import CompiledModel
from tests.batches import batch, logits_of, passed
from tests.checkpoint.models import TINY, random_bits, write_hf
from tests.packing import pack, unpack

IDS = [3, 96, 41, 7, 7, 58, 12, 90, 33]


def write(folder: Path, name: str) -> Path:
    return write_model(folder, TINY[name])


def write_model(folder: Path, config: ModelConfig) -> Path:
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(t.shape, generator=generator).bfloat16() for n, t in random_bits(config).items()}
    write_hf(folder, config, parameters=values)
    return folder


def matrices(parameters: PackedParameters) -> dict[str, bytes]:
    out = {}
    for name, value in parameters.parameters.items():
        for i, one in enumerate(value if isinstance(value, list) else [value]):
            raw = one.data if isinstance(one, Packed) else one
            out[f"{name}/{i}"] = raw.tobytes()
    return out


def logits(name: str, packed: PackedParameters) -> torch.Tensor:
    model = CompiledModel(TINY[name], packed.parameters, threads=2, n_blocks=4, store=packed.store)
    out = logits_of(model, batch([(IDS, 0, [0])]))
    again = logits_of(model, batch([(IDS, 0, [1])]))
    assert torch.equal(out, again)
    return out


@pytest.mark.parametrize("form", ["keep", "q4", "q4m", "q8", "mx4", "float32"])
@pytest.mark.parametrize("name", TINY)
def test_a_packed_directory_holds_what_packing_at_load_makes(tmp_path: Path, name: str, form: str) -> None:
    write(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "out", format=form, embeddings=form)
    assert engine_file.verify(tmp_path / "out") == []
    assert matrices(load_packed(open_checkpoint(tmp_path / "out"))) == matrices(
        load_packed(open_checkpoint(tmp_path / "hf"), form)
    )


def test_mapped_and_copied_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "hf", "dbrx")
    convert(tmp_path / "hf", tmp_path / "out", format="q4")
    copied = load_packed(open_checkpoint(tmp_path / "out"))
    monkeypatch.setattr(packed_module.runtime, "memory_bytes", lambda: (1000, 1000))
    mapped = load_packed(open_checkpoint(tmp_path / "out"))
    assert isinstance(mapped.parameters["layers.0.attn.wo.weight"].data.base, np.memmap)  # type: ignore[union-attr]
    assert matrices(mapped) == matrices(copied)


def test_a_packed_directory_can_be_read_as_numbers_and_converted_on(tmp_path: Path) -> None:
    write(tmp_path / "hf", "mixtral")
    convert(tmp_path / "hf", tmp_path / "q8", format="q8")
    values = load_parameters(open_checkpoint(tmp_path / "q8"))
    source = load_parameters(open_checkpoint(tmp_path / "hf"))
    for name, expected in source.items():
        assert float((values[name].float() - expected.float()).abs().max()) < 0.03, name
    convert(tmp_path / "q8", tmp_path / "back", to="hf", dtype="float32")
    back = load_parameters(open_checkpoint(tmp_path / "back"))
    assert all(torch.equal(back[name], value.float()) for name, value in values.items())


def test_embeddings_and_head_stay_wider_beside_four_bits(tmp_path: Path) -> None:
    write(tmp_path / "hf", "dbrx")
    convert(tmp_path / "hf", tmp_path / "out", format="q4")
    entries = engine_file.read_manifest(tmp_path / "out").parameters
    assert entries["embed.weight"].format == entries["lm_head.weight"].format == "q8"
    assert entries["layers.0.moe.router.weight"].format == "float32"
    assert entries["layers.1.moe.w_up/4"].format == "q4"


def test_a_recipe_gives_each_matrix_its_format(tmp_path: Path) -> None:
    write(tmp_path / "hf", "dbrx")
    shapes = engine_file.packed_shapes(TINY["dbrx"])
    recipe = {n: ("q8" if "w_down/2" in n else "q4") for n, shape in shapes.items() if len(shape) == 2}
    recipe.update({n: "float32" for n in recipe if n.endswith("router.weight")})
    convert(tmp_path / "hf", tmp_path / "out", format=recipe)
    entries = engine_file.read_manifest(tmp_path / "out").parameters
    assert {n: entries[n].format for n in recipe} == recipe
    with pytest.raises(ConfigError, match=r"attn\.wo"):
        convert(tmp_path / "hf", tmp_path / "no", format={n: f for n, f in recipe.items() if "attn.wo" not in n})


def test_each_matrix_has_its_own_importance(tmp_path: Path) -> None:
    write(tmp_path / "hf", "mixtral")
    important = "layers.1.moe.w_down/3"
    weights = np.linspace(0.01, 9.0, 80, dtype=np.float32)
    convert(tmp_path / "hf", tmp_path / "plain", format="q4")
    convert(tmp_path / "hf", tmp_path / "out", format="q4", importance={important: weights})
    plain, out = (engine_file.read_manifest(tmp_path / name).parameters for name in ("plain", "out"))
    assert [name for name in plain if plain[name].sha256 != out[name].sha256] == [important]
    values = load_parameters(open_checkpoint(tmp_path / "hf"))["layers.1.moe.w_down"][3]
    packed = pack(values, "q4", importance=torch.from_numpy(weights))
    stored = load_packed(open_checkpoint(tmp_path / "out")).parameters["layers.1.moe.w_down"][3]  # type: ignore[index]
    assert packed.data.tobytes() == stored.data.tobytes()


# Rows of whole blocks of 32; grouped heads, so that rows of q and of k are reordered differently.
BLOCKS = uniform_model(
    family="llama2",
    vocab_size=97,
    d_model=64,
    n_layers=2,
    max_seq_len=48,
    norm=NormSpec(kind="rms"),
    mixer=AttentionSpec(n_heads=6, n_kv_heads=2, head_dim=16, position=RopeSpec(theta=1e4)),
    ffn=DenseSpec(d_ff=160, activation="silu"),
)


@pytest.mark.parametrize(("stored", "form"), [("q8_0", "q8"), ("q4_0", "q4")])
def test_blocks_of_a_gguf_file_are_kept_to_the_bit(tmp_path: Path, stored: str, form: str) -> None:
    """Interleaved rotary rows too: their blocks move as their numbers would."""
    values = {n: torch.randn(t.shape) for n, t in random_bits(BLOCKS).items()}
    write_hf(tmp_path / "hf", BLOCKS, parameters=values)
    convert(tmp_path / "hf", tmp_path / "x.gguf", to="gguf", gguf_format=stored)
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    numbers, packed = load_parameters(checkpoint), load_packed(checkpoint).parameters
    for name in ("layers.1.attn.wqkv.weight", "layers.0.attn.wo.weight", "layers.1.ffn.w_up"):
        one = packed[name]
        assert isinstance(one, Packed)
        assert one.format == form
        assert torch.equal(unpack(one), numbers[name].float())


def test_blocks_of_another_format_are_packed_anew(tmp_path: Path) -> None:
    values = {n: torch.randn(t.shape) for n, t in random_bits(BLOCKS).items()}
    write_hf(tmp_path / "hf", BLOCKS, parameters=values)
    convert(tmp_path / "hf", tmp_path / "x.gguf", to="gguf", gguf_format="q8_0")
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    numbers, packed = load_parameters(checkpoint), load_packed(checkpoint, "q4").parameters
    for name in ("layers.1.attn.wqkv.weight", "layers.1.ffn.w_up"):
        one = packed[name]
        assert isinstance(one, Packed)
        assert one.data.tobytes() == pack(numbers[name].float(), "q4").data.tobytes()


def test_an_interrupted_packing_is_resumed_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "hf", "dbrx")
    monkeypatch.setattr(conversion_writer, "_SYNC_BYTES", 10_000)
    convert(tmp_path / "hf", tmp_path / "whole", format="q4")
    real, calls = os.pwrite, [0]

    def pwrite(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] == 25:
            raise OSError(28, os.strerror(28))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(CheckpointError, match="No space"):
            convert(tmp_path / "hf", tmp_path / "out", format="q4")
    written: list[str] = []
    convert(tmp_path / "hf", tmp_path / "out", format="q4", progress=lambda done, total, name: written.append(name))
    assert len(set(written)) < len(engine_file.packed_shapes(TINY["dbrx"]))
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


# Experts on disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dbrx", "mixtral", "grok1", "glm4moe", "nemotron_h"])
def test_experts_on_disk_give_the_same_answer(tmp_path: Path, name: str) -> None:
    write(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "out", format="q8")
    in_memory = load_packed(open_checkpoint(tmp_path / "out"))
    experts = [p for v in in_memory.parameters.values() if isinstance(v, list) for p in v]
    one_layer = sum(-(-p.data.nbytes // 4096) * 4096 for p in experts)  # whole pages
    one_layer //= len(TINY[name].moe_layers)
    expected = logits(name, in_memory)
    for budget, everything_fits in ((one_layer, len(TINY[name].moe_layers) == 1), (100 * one_layer, True)):
        on_disk = load_packed(open_checkpoint(tmp_path / "out"), expert_memory=budget)
        assert torch.equal(logits(name, on_disk), expected)
        assert on_disk.store is not None
        stats = on_disk.store.stats()
        assert stats.misses > 0 and stats.bytes_read > 0 and stats.bytes_held > 0
        assert stats.bytes_held <= budget
        # The second pass over the same tokens finds everything only if everything fits.
        assert (stats.hits >= stats.misses) == everything_fits


def test_a_cache_smaller_than_one_token_still_helps(tmp_path: Path) -> None:
    """Layers come in a circle, where dropping what was used longest ago would drop exactly what comes next."""
    write(tmp_path / "hf", "dbrx")
    convert(tmp_path / "hf", tmp_path / "out", format="q8")
    whole = load_packed(open_checkpoint(tmp_path / "out"))
    experts = [p for v in whole.parameters.values() if isinstance(v, list) for p in v]
    per_expert = sum(-(-p.data.nbytes // 4096) * 4096 for p in experts) // (TINY["dbrx"].n_layers * 5)
    on_disk = load_packed(open_checkpoint(tmp_path / "out"), expert_memory=8 * per_expert)  # a token visits 12
    model = CompiledModel(TINY["dbrx"], on_disk.parameters, threads=2, n_blocks=4, store=on_disk.store)
    for _ in range(20):
        logits_of(model, batch([(IDS[:1], 0, [0])]))
    assert on_disk.store is not None
    assert on_disk.store.stats().hit_rate > 0.4


class Cache:
    """What the store of experts on disk says it does: every layer has a share of the slots and gives up its own.

    The least recently used one of a layer that has its share; else of a layer that has more than its share; else the
    most recently used one of all, which is needed last.
    """

    def __init__(self, n_slots: int, n_layers: int) -> None:
        self.n_slots, self.share = n_slots, n_slots // n_layers
        self.used: list[tuple[int, int]] = []  # (layer, expert), least recently used first
        self.hits = self.misses = 0

    def ask(self, layer: int, experts: list[int]) -> None:
        wanted = [(layer, expert) for expert in experts]
        here = [one for one in wanted if one in self.used]
        for one in here:
            self.used.remove(one)
            self.used.append(one)
        self.hits += len(here)
        held = list(here)
        for one in wanted:
            if one in here:
                continue
            self.misses += 1
            if len(self.used) == self.n_slots:
                self.used.remove(self.victim(layer, [u for u in self.used if u not in held]))
            self.used.append(one)
            held.append(one)

    def victim(self, layer: int, free: list[tuple[int, int]]) -> tuple[int, int]:
        n_of = Counter(owner for owner, _ in self.used)
        own = [one for one in free if one[0] == layer]
        if n_of[layer] >= self.share and own:
            return own[0]
        rich = [one for one in free if n_of[one[0]] > self.share]
        return rich[0] if rich else free[-1]


DENSE, MIXTURE = TINY["glm4moe"].layers[0], TINY["glm4moe"].layers[-1]
BEHIND_DENSE = replace(TINY["glm4moe"], layers=(DENSE, DENSE, MIXTURE, MIXTURE, MIXTURE))
"""Slots are shared by the layers that have experts alone."""


@pytest.mark.parametrize(
    ("config", "n_slots"), [(TINY["dbrx"], 5), (TINY["dbrx"], 8), (TINY["dbrx"], 11), (BEHIND_DENSE, 6)]
)
def test_the_cache_of_experts_gives_up_what_it_says(tmp_path: Path, config: ModelConfig, n_slots: int) -> None:
    """Counted hit by hit, over tokens that choose their experts as they like."""
    write_model(tmp_path / "hf", config)
    convert(tmp_path / "hf", tmp_path / "out", format="q8")
    whole = load_packed(open_checkpoint(tmp_path / "out"))
    experts = [p for v in whole.parameters.values() if isinstance(v, list) for p in v]
    n_layers = len(config.moe_layers)
    per_expert = sum(-(-p.data.nbytes // 4096) * 4096 for p in experts) // (n_layers * 5)
    on_disk = load_packed(open_checkpoint(tmp_path / "out"), expert_memory=n_slots * per_expert)
    model = CompiledModel(config, on_disk.parameters, threads=1, n_blocks=4, store=on_disk.store)
    cache = Cache(n_slots, n_layers)
    for token in [*range(0, 90, 7), *range(0, 90, 7), 3, 3, 3, *range(97)]:
        for layer, stats in enumerate(passed(model, batch([([token], 0, [0])]))[1]):
            cache.ask(layer, sorted(stats.expert_ids[0].tolist()))
        assert on_disk.store is not None
        stats = on_disk.store.stats()
        assert (stats.hits, stats.misses) == (cache.hits, cache.misses), token
    assert cache.hits > 0


def test_a_file_cut_short_while_experts_are_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "hf", "dbrx")
    convert(tmp_path / "hf", tmp_path / "out", format="q8")
    on_disk = load_packed(open_checkpoint(tmp_path / "out"), expert_memory=1)
    for file in (tmp_path / "out").glob("*.packed"):
        os.truncate(file, 5000)
    model = CompiledModel(TINY["dbrx"], on_disk.parameters, threads=2, n_blocks=4, store=on_disk.store)
    with pytest.raises(CheckpointError, match="cut short"):
        logits_of(model, batch([(IDS, 0, [0])]))


def test_only_packed_directories_can_leave_experts_on_disk(tmp_path: Path) -> None:
    write(tmp_path / "hf", "dbrx")
    with pytest.raises(ConfigError, match="quadriga convert"):
        load_packed(open_checkpoint(tmp_path / "hf"), expert_memory=1 << 20)


# Hostile manifests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": -64}, "offset"),
        ({"offset": 32}, "offset"),
        ({"offset": 1 << 40}, "cut short"),
        ({"nbytes": 1 << 40}, "impossible"),
        ({"nbytes": 0}, "impossible"),
        ({"format": "q3"}, "format"),
        ({"shape": [1 << 20, 1 << 20]}, r"attn\.wo"),
        ({"file": "../../secret.packed"}, "secret"),
        ({"file": "/etc/passwd"}, "passwd"),
        ({"file": "gone.packed"}, "gone.packed"),
    ],
)
def test_entries_that_point_elsewhere_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "hf", "dbrx")
    convert(tmp_path / "hf", tmp_path / "out", format="q4")
    (tmp_path / "secret.packed").write_bytes(bytes(1 << 20))
    manifest = tmp_path / "out/quadriga.json"
    body = json.loads(manifest.read_text())
    body["parameters"]["layers.0.attn.wo.weight"] |= change
    manifest.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=message):
        load_packed(open_checkpoint(tmp_path / "out"))


def test_a_packed_file_cut_short_is_refused_at_load(tmp_path: Path) -> None:
    write(tmp_path / "hf", "dbrx")
    convert(tmp_path / "hf", tmp_path / "out", format="q4")
    last = max(engine_file.read_manifest(tmp_path / "out").parameters.values(), key=lambda e: e.offset)
    os.truncate(tmp_path / "out" / last.file, last.offset + last.nbytes - 1)
    with pytest.raises(CheckpointError, match="cut short"):
        load_packed(open_checkpoint(tmp_path / "out"))
