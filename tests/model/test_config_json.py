"""A ModelConfig as JSON: every preset comes back, what the first release wrote is still read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quadriga.errors import CheckpointError, ConfigError
from quadriga.model import families
from quadriga.model.config_json import config_from_json, config_to_json
from tests.checkpoint.models import TINY
from tests.mixed import MIXED

CONFIGS = {**families.PRESETS, **TINY, "mixed": MIXED}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_comes_back(name: str) -> None:
    text = json.dumps(config_to_json(CONFIGS[name]))
    assert config_from_json(json.loads(text)) == CONFIGS[name]


def test_equal_neighbours_stand_once() -> None:
    assert [layer["times"] for layer in config_to_json(families.preset("dbrx-132b"))["layers"]] == [40]
    assert [layer["times"] for layer in config_to_json(MIXED)["layers"]] == [1, 2, 1, 1]


def test_what_the_first_release_wrote_is_read() -> None:
    written = {
        "family": "dbrx", "vocab_size": 97, "d_model": 48, "n_layers": 4, "max_seq_len": 64,
        "norm": {"kind": "layer", "eps": 1e-05}, "position": {"kind": "rope", "theta": 500000.0},
        "attn": {"n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "clip_qkv": 8.0, "soft_cap": None, "scale": None},
        "ffn": {"kind": "moe", "d_ff": 80, "n_experts": 5, "top_k": 3, "activation": "silu", "normalize_p": 1.0,
                "aggregate": "weighted_sum", "aux_loss_weight": 0.05, "jitter_eps": 0.0},
        "post_norms": False, "tied_embeddings": False, "embedding_scale": 1.0, "logit_scale": 1.0, "bos_id": None,
        "eos_ids": [7], "pad_id": None,
    }  # fmt: skip
    expected = replace(TINY["dbrx"], vocab_size=97, d_model=48, max_seq_len=64, eos_ids=(7,)).with_n_layers(4)
    assert config_from_json(written) == expected
    with pytest.raises(ConfigError, match=r"model\.n_layers must be a positive whole number, got None"):
        config_from_json({key: value for key, value in written.items() if key != "n_layers"})
    with pytest.raises(CheckpointError, match="position"):
        config_from_json({**written, "position": {"kind": "learned"}})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": [{"times": 0}]}, "positive whole number, got 0"),
        ({"layers": [{"times": 10**9}]}, "at most 10000"),
        ({"layers": "all"}, "must be a list"),
        ({"layers": [7]}, "must be an object"),
        ({"surprise": 1}, "surprise"),
        ({"final_norm": None}, "lacks its NormSpec"),
    ],
)
def test_what_no_model_can_have_is_refused(change: dict[str, object], says: str) -> None:
    body = config_to_json(MIXED)
    for layer in change.get("layers", []):  # type: ignore[attr-defined]
        if isinstance(layer, dict):
            layer.update({key: value for key, value in body["layers"][0].items() if key not in layer})
    with pytest.raises((CheckpointError, ConfigError), match=says):
        config_from_json(body | change)
