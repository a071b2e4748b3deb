"""Opening checkpoints: every layout of every family gives the same parameters, and a mismatch says what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.detect import locate
from quadriga.io.fingerprint import fingerprint
from quadriga.io.open import open_checkpoint
from quadriga.io.quantised.gptq import Gptq
from quadriga.kernels.arrays import tensor
from quadriga.model import families
from quadriga.model.weight_map import source_shapes
from quadriga.nn.load import load_parameters
from tests.checkpoint import test_quantised
from tests.checkpoint.models import TINY, bits, random_bits, write_hf

LAYOUTS = [
    (name, layout)
    for name, config in TINY.items()
    for layout in families.family_of(config).layouts
    if layout != "jax"  # Grok-1's released files are pickles: test_grok_pickle.py
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_layout_is_recognised_and_read_bit_by_bit(tmp_path: Path, name: str, layout: str) -> None:
    config = TINY[name]
    expected = random_bits(config)
    write_hf(tmp_path, config, layout, n_shards=3)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.layout, checkpoint.config) == ("hf", layout, config)
    loaded = load_parameters(checkpoint)
    assert loaded.keys() == expected.keys()
    for parameter, values in expected.items():
        assert bits(loaded[parameter]) == bits(values), parameter


def test_boxes_smaller_and_larger_than_the_stored_pieces(tmp_path: Path) -> None:
    config = TINY["dbrx"]
    expected = random_bits(config)
    write_hf(tmp_path, config, "split-qkv")
    view = open_checkpoint(tmp_path).parameters
    box = ((1, 4), (5, 80), (7, 31))
    assert bits(tensor(view.read("layers.1.moe.w_gate", box))) == bits(expected["layers.1.moe.w_gate"][1:4, 5:80, 7:31])
    assert bits(tensor(view.read("layers.2.attn.wqkv.weight", ((40, 70), (0, 48))))) == bits(
        expected["layers.2.attn.wqkv.weight"][40:70]
    )


def test_dtype_is_the_caller_s_choice(tmp_path: Path) -> None:
    config = TINY["llama2"]
    values = {name: torch.randn(t.shape) for name, t in random_bits(config).items()}
    write_hf(tmp_path, config, parameters=values)
    checkpoint = open_checkpoint(tmp_path)
    seen: list[tuple[int, int, str]] = []
    loaded = load_parameters(checkpoint, dtype=torch.bfloat16, progress=lambda *step: seen.append(step))
    assert all(torch.equal(loaded[name], values[name].bfloat16()) for name in values)
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in loaded.values())


def test_one_error_lists_both_sides(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path, TINY["mixtral"])
    tensors["model.layers.1.extra.weight"] = torch.ones(3, dtype=torch.bfloat16)
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(47, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(tmp_path)
    said = str(raised.value)
    assert "lacks: model.layers.0.self_attn.k_proj.weight" in said
    assert "has no place for: model.layers.1.extra.weight" in said
    assert "model.norm.weight: must be [48], the file has [47]" in said


def test_a_stored_copy_of_tied_embeddings_must_be_one(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path, TINY["llama2-tied"])
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": copy}, tmp_path / "model.safetensors")
    expected = random_bits(TINY["llama2-tied"])["embed.weight"]
    assert bits(load_parameters(open_checkpoint(tmp_path))["embed.weight"]) == bits(expected)
    copy.view(torch.uint8)[5, 5] ^= 1
    save_file(tensors | {"lm_head.weight": copy}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="two different tensors"):
        open_checkpoint(tmp_path)


def test_a_layer_for_multi_token_prediction_is_left_out_by_name_and_that_is_said(tmp_path: Path) -> None:
    config = TINY["glm4moe"]
    folder = tmp_path / "hf"
    write_hf(folder, config)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 1}))
    tensors = load_file(folder / "model.safetensors")
    layer = {
        name.replace(".2.", ".3.", 1): t.clone() for name, t in tensors.items() if name.startswith("model.layers.2.")
    }
    joints = ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.norm", "shared_head.head")
    more = {f"model.layers.3.{name}.weight": torch.ones(3) for name in joints}
    assert len(layer) > 20
    save_file(tensors | layer | more, folder / "model.safetensors")
    assert open_checkpoint(folder).config == config
    assert "multi-token prediction" in locate(folder).notes[0]
    save_file(tensors | layer | more | {"model.layers.3.extra.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors .* no place for: model.layers.3.extra.weight"):
        open_checkpoint(folder)

    (folder / "config.json").write_text(json.dumps(raw))
    assert locate(folder).notes == ()


def test_ernies_block_for_multi_token_prediction_is_left_out_too(tmp_path: Path) -> None:
    config = TINY["ernie4_5-moe"]
    write_hf(tmp_path, config)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in (0, 2):  # a dense block, or one with experts
        prefix = f"model.layers.{layer}."
        block = {name.replace(prefix, "model.mtp_block.0."): t.clone() for name, t in tensors.items() if prefix in name}
        joints = {f"model.mtp_{name}.0.weight": torch.ones(3) for name in ("emb_norm", "hidden_norm", "linear_proj")}
        save_file(tensors | block | joints, tmp_path / "model.safetensors")
        assert open_checkpoint(tmp_path).config == config
    save_file(tensors | {"model.mtp_other.0.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no place for: model\.mtp_other"):
        open_checkpoint(tmp_path)


def test_the_same_layer_in_a_gguf_file(tmp_path: Path) -> None:
    config = TINY["glm4moe"]
    family = families.family_of(config)
    metadata: dict[str, object] = {"general.architecture": "glm4moe", **family.config_to_gguf(config)}
    shapes = source_shapes(family.gguf_map(config))
    assert families.read_gguf(metadata, shapes) == (config, [])
    metadata |= {"glm4moe.block_count": 4, "glm4moe.nextn_predict_layers": 1}
    found, notes = families.read_gguf(metadata, shapes)
    assert found == config and "multi-token prediction" in notes[0]
    names = {f"blk.3.nextn.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "embed_tokens")}
    names |= {"blk.3.nextn.shared_head_norm.weight", "blk.3.nextn.shared_head_head.weight"}
    names |= {name.replace(".2.", ".3.", 1) for name in shapes if name.startswith("blk.2.")}
    assert names == {name for name in family.left_out(config) if name.startswith("blk.")}


def test_generation_config_brings_the_end_tokens(tmp_path: Path) -> None:
    write_hf(tmp_path, replace(TINY["dbrx"], eos_ids=()))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [57, 79]}')
    assert open_checkpoint(tmp_path).config.eos_ids == (57, 79)


def booby_trapped(folder: Path) -> Path:
    """A repository that wants to run code in every way known."""
    write_hf(folder, TINY["dbrx"])
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "trust_remote_code": True,
        "_attn_implementation_internal": "evil/kernels",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code from a checkpoint ran')")
    return folder


def test_code_in_a_checkpoint_is_never_followed(tmp_path: Path) -> None:
    assert open_checkpoint(booby_trapped(tmp_path)).config == TINY["dbrx"]


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 10**9},
        {"n_layers": -1},
        {"d_model": float("nan")},
        {"d_model": "x" * 10**6},
        {"vocab_size": 2**70},
        {"ffn_config": None},
        {"surprise": 1},
        {"model_type": "mystery"},
    ],
)
def test_hostile_configs_end_in_one_short_error(tmp_path: Path, change: dict[str, object]) -> None:
    write_hf(tmp_path, TINY["dbrx"])
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ConfigError, CheckpointError)) as raised:
        open_checkpoint(tmp_path)
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a text file", "a lone shard"])
def test_what_is_no_checkpoint_says_so(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    match what:
        case "an empty folder":
            path.mkdir()
        case "a text file":
            path.write_text("hello")
        case "a lone shard":
            path = tmp_path / "model.safetensors"
            save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tekken.json", "cl100k_base.tiktoken"])
def test_a_vocabulary_is_called_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name} is a vocabulary, not a model: it has no weights"):
        open_checkpoint(tmp_path / name)


def test_the_tests_own_writer_is_the_library(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path, TINY["mpt"])
    again = load_file(tmp_path / "model.safetensors")
    assert all(bits(again[name]) == bits(tensor) for name, tensor in tensors.items())


def test_a_repository_that_holds_the_model_twice(tmp_path: Path) -> None:
    """Mistral's: Hugging Face's names and its own, in one folder."""
    tensors = write_hf(tmp_path, TINY["mixtral"], n_shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"output.weight": tensors["lm_head.weight"]}, tmp_path / "consolidated.safetensors")
    assert open_checkpoint(tmp_path).layout == "hf"


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "gpt_oss"])
def test_other_weights_have_another_fingerprint(tmp_path: Path, name: str) -> None:
    """A change of any one tensor, at any expert, tells; the same files elsewhere have the same."""
    config = TINY[name]
    for folder in ("one", "two"):
        write_hf(tmp_path / folder, config)
    found = fingerprint(open_checkpoint(tmp_path / "one"))
    assert fingerprint(open_checkpoint(tmp_path / "two")) == found
    file = next((tmp_path / "two").glob("*.safetensors"))
    held = load_file(file)
    seen = {found}
    for key, values in held.items():
        save_file({**held, key: values + 1}, file)
        seen.add(fingerprint(open_checkpoint(tmp_path / "two")))
    assert len(seen) == len(held) + 1
    stack = {key: values for key, values in held.items() if values.ndim == 3}
    for key, values in stack.items():
        for expert in range(len(values)):
            changed = values.clone()
            changed[expert] += 1
            save_file({**held, key: changed}, file)
            seen.add(fingerprint(open_checkpoint(tmp_path / "two")))
    assert len(seen) == len(held) + 1 + sum(map(len, stack.values()))


def test_a_fingerprint_reads_packed_weights_as_they_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked, each of 16 rows of GPTQ's would be read across its whole tensor; any part that differs tells."""
    test_quantised.write(tmp_path, test_quantised.GPTQ, test_quantised.gptq)

    def never(*given: object) -> None:
        raise AssertionError("nothing is unpacked")

    monkeypatch.setattr(Gptq, "read", never)
    found = {fingerprint(open_checkpoint(tmp_path))}
    file = next(tmp_path.glob("*.safetensors"))
    held = load_file(file)
    parts = [key for key in held if "layers.0.self_attn.q_proj" in key]
    assert len(parts) == 3
    for key in parts:
        save_file({**held, key: held[key].flip(0) + key.endswith("qzeros")}, file)
        found.add(fingerprint(open_checkpoint(tmp_path)))
    assert len(found) == len(parts) + 1
