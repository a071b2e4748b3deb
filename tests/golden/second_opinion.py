"""A second opinion on today's mixtures: transformers 5.24.0 writes directories, and the CPU's kernels read them.

    env5/bin/python tests/golden/second_opinion.py write FOLDER      where transformers 5.24.0 and torch are installed
    python tests/golden/second_opinion.py check FOLDER               here; prints max |dlogit| as a share of the range

By hand, not in the suite, which has transformers 4.57.6: that version knows all of these but MiniMax-M2.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from tests.golden.weights import BESIDE_TRANSFORMERS, MODELS, TOKENS

NAMES = (
    *("minimax-m2", "glm4moe", "qwen2moe", "dots1", "ernie4_5-moe", "hunyuan-moe"),
    *("deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "glm4_moe_lite"),
    *("lfm2", "lfm2moe", "qwen3next", "qwen35moe"),
    *("granitehybrid", "granitehybrid-groups", "granitehybrid-dense"),
    *("gemma4", "gemma4-dense"),
    *("nemotron_h", "nemotron_h-dense", "mellum", "granitemoe_swa"),
)


def write(folder: Path) -> None:
    """A directory of each model, with random weights, and its logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in NAMES:
        raw = dict((MODELS | BESIDE_TRANSFORMERS)[name])
        config = AutoConfig.for_model(str(raw.pop("model_type")), **raw)
        config._attn_implementation = "eager"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for place, values in (*model.named_parameters(), *model.named_buffers()):
                if "inv_freq" not in place:  # vectors, and so corrections, around 1
                    values.normal_(0.0, 0.3) if values.ndim > 1 else values.normal_(1.0, 0.2)
            model.tie_weights()
            logits = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
        model.save_pretrained(folder / name)
        np.save(folder / name / "logits.npy", logits)


def check(folder: Path) -> None:
    """How far the kernels' logits are from those that were written."""
    from quadriga import load

    for name in NAMES:
        wanted = np.load(folder / name / "logits.npy")
        logits = load(folder / name, format="float32", kv_format="float32", threads=1).logits(TOKENS)
        print(f"{name:16} {np.abs(logits - wanted).max() / np.ptp(wanted):.1e}")


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
