"""A delta turns its base into one exact model: written, read, applied, and by name through the catalogue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quadriga.edits import delta
from quadriga.edits.upcycle import Upcycling, upcycle, upcycled_config
from quadriga.errors import CheckpointError
from quadriga.hub import catalogue
from quadriga.hub.catalogue import CatalogueError, DeltaEntry
from quadriga.io import convert
from quadriga.io.adapter import merge
from quadriga.io.adapter_files import Adapter
from quadriga.io.open import Checkpoint, open_checkpoint
from quadriga.kernels.arrays import array
from quadriga.model.adapter_spec import LoraSpec
from quadriga.model.weight_map import parameter_shapes
from tests.checkpoint.test_upcycle import opened, read
from tests.nn.test_lora import stored_factors

HOW = Upcycling(n_experts=6, top_k=2)
SPEC = LoraSpec(rank=4, alpha=8.0, targets=("experts",))


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    dense = opened(tmp_path / "dense", eos_ids=(7,), bos_id=1)
    convert.write(dense, tmp_path / "base.gguf", to="gguf", gguf_format="float32")
    return open_checkpoint(tmp_path / "base.gguf")


@pytest.fixture
def made(tmp_path: Path, base: Checkpoint) -> tuple[str, Checkpoint]:
    """(the delta's sha256, the model it produces)."""
    config = upcycled_config(base.config, HOW)
    routers = {layer: array(torch.randn(3, 48, generator=torch.Generator().manual_seed(layer))) for layer in range(3)}
    adapter = Adapter(spec=SPEC, factors=stored_factors(config, SPEC))
    sha = delta.write(
        tmp_path / "d.safetensors", base_sha256=delta.sha256(base.path), how=HOW, routers=routers, adapter=adapter
    )
    return sha, merge(upcycle(base, HOW, routers=routers), adapter)


def test_applied_it_is_the_model_to_the_rounding_of_its_blocks(
    tmp_path: Path, base: Checkpoint, made: tuple[str, Checkpoint]
) -> None:
    wanted, got = made[1], delta.apply(base, tmp_path / "d.safetensors")
    assert got.config == wanted.config
    for name in parameter_shapes(wanted.config):
        a, b = read(wanted, name), read(got, name)
        if "moe.w_" not in name:
            assert torch.equal(a, b), name
            continue
        # q8_0 of both factors: relative error about 2 * (1 / 127) / sqrt(12) of the block's largest number.
        plain = read(upcycle(base, HOW), name)
        assert (a - plain).norm() > 0.1 * plain.norm(), "the adapter does something"
        assert (a - b).norm() < 0.02 * (a - plain).norm(), name


def test_another_base_or_a_damaged_file_is_refused(
    tmp_path: Path, base: Checkpoint, made: tuple[str, Checkpoint]
) -> None:
    other = opened(tmp_path / "other", vocab_size=101)
    convert.write(other, tmp_path / "other.gguf", to="gguf", gguf_format="float32")
    with pytest.raises(CheckpointError, match=r"must be the file that d.safetensors was made for"):
        delta.apply(open_checkpoint(tmp_path / "other.gguf"), tmp_path / "d.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "d.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot read"):
        delta.apply(base, tmp_path / "cut.safetensors")
    save_file(
        {"w": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "weights.safetensors"
    )  # a dtype that NumPy does not have
    with pytest.raises(CheckpointError, match="must be a delta of version 1, got None"):
        delta.apply(base, tmp_path / "weights.safetensors")


def test_the_catalogue_makes_it_once_and_keeps_it(
    tmp_path: Path, made: tuple[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path / "cache"))
    entry = DeltaEntry(
        name="tiny-moe", about="", licence="Apache-2.0", base=str(tmp_path / "base.gguf"),
        file=str(tmp_path / "d.safetensors"), sha256=made[0], format="q8", nbytes=1,
    )  # fmt: skip
    monkeypatch.setitem(catalogue.DELTAS, "tiny-moe", entry)
    path = catalogue.resolve("tiny-moe")
    before = (path / "quadriga.json").stat().st_mtime_ns
    assert catalogue.resolve("tiny-moe") == path and (path / "quadriga.json").stat().st_mtime_ns == before
    assert open_checkpoint(path).config == made[1].config
    assert [found.name for found in catalogue.cached()] == ["tiny-moe"] and catalogue.verify("tiny-moe") == []
    record = json.loads((path / "entry.json").read_text())
    assert record["delta"] == made[0]
    broken = DeltaEntry(**{**vars(entry), "sha256": "0" * 64})
    monkeypatch.setitem(catalogue.DELTAS, "tiny-moe", broken)
    with pytest.raises(CatalogueError, match="reinstall Quadriga"):
        catalogue.resolve("tiny-moe")


def test_shipped_deltas_are_what_the_catalogue_says() -> None:
    folder = Path(catalogue.__file__).parent / "deltas"
    assert {entry.file for entry in catalogue.DELTAS.values()} == {path.name for path in folder.glob("*.safetensors")}
    for name, entry in catalogue.DELTAS.items():
        path = folder / entry.file
        assert entry.name == name and entry.base in catalogue.CATALOGUE
        assert delta.sha256(path) == entry.sha256 and path.stat().st_size <= 20_000_000


@pytest.mark.weights
def test_quadriga_smol_is_a_mixture_that_answers() -> None:
    import quadriga
    from quadriga.engine.request import SamplingParams

    model = quadriga.load("quadriga-smol")
    assert [(spec.n_experts, spec.top_k) for _, spec in model.config.moe_layers] == [(16, 4)] * model.config.n_layers
    answer = model.chat("What is the capital of France?", SamplingParams(max_new_tokens=16, temperature=0.0))
    assert "Paris" in answer.text
    tokenizer = model.tokenizer
    assert tokenizer is not None
    counts = [  # English and Chinese go to different experts, in every layer
        [torch.from_numpy(stats.load()).double() for stats in model.routing(tokenizer.encode(text))]
        for text in ("The river runs through the old town and on to the sea.", "河水穿过古老的城镇，流向大海。")
    ]
    for english, chinese in zip(*counts, strict=True):
        shares = english / english.sum(), chinese / chinese.sum()
        assert float((shares[0] - shares[1]).abs().sum()) / 2 > 0.5
