"""Make the golden files of models that transformers knows from version 5 on, with 5.24.0.

    python -m venv env5 && env5/bin/pip install torch==2.13.0 transformers==5.24.0
    PYTHONPATH=src env5/bin/python tests/golden/make_golden5.py

The directory that the tests open, with drawn weights under the published names, is what transformers reads here, so
names and layouts are part of what is compared. Writes results/MODEL.safetensors beside this file: logits (prefill,
single steps behind a cache, a padded batch) and, for every published tensor, the gradient of a text's loss in float64
as its products with drawn directions (``gradient.NAME``, see ``weights.in_directions``).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from tests.golden import checkpoints
from tests.golden.make_golden import decoded
from tests.golden.weights import FIXED, IN_TRANSFORMERS_5, TOKENS, in_directions, ragged

HERE = Path(__file__).parent


def read(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a directory; every tensor of the text must be used, and none be missing but those of pictures."""
    cls = transformers.AutoModelForCausalLM
    if "vision_config" in (folder / "config.json").read_text():
        cls = transformers.AutoModelForImageTextToText
    options = {"dtype": dtype, "attn_implementation": "eager", "experts_implementation": "eager"}
    model, loading = cls.from_pretrained(folder, output_loading_info=True, **options)
    missing = {name for name in loading["missing_keys"] if ".visual." not in name}
    assert not missing and not loading["unexpected_keys"] and not loading["mismatched_keys"], loading
    return model.eval()


@torch.no_grad()
def logits(folder: Path) -> dict[str, torch.Tensor]:
    """Of the prefill, of the cached decoding and of the batch padded on the right."""
    model = read(folder, torch.float32)
    ids = torch.tensor([TOKENS])
    made = {"prefill": model(input_ids=ids, use_cache=False).logits[0], "decode": decoded(model, ids)}
    sequences = ragged()
    batch = torch.zeros((len(sequences), max(map(len, sequences))), dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, sequence in enumerate(sequences):
        batch[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    padded = model(input_ids=batch, attention_mask=mask, use_cache=False).logits
    return made | {"ragged": torch.cat([padded[row, : len(s)] for row, s in enumerate(sequences)])}


class Wide:
    """torch, as a module of transformers sees it that is to compute in float64 where it says float32."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def gradients(folder: Path) -> dict[str, torch.Tensor]:
    """In directions, by published name: the parameters become their gradients, and the model is saved."""
    model = read(folder, torch.float64)
    module = sys.modules[type(model).__module__]
    narrow = torch.Tensor.float
    module.torch, torch.Tensor.float = Wide(), torch.Tensor.double  # type: ignore[attr-defined, method-assign]
    ids = torch.tensor(TOKENS)
    made = model(input_ids=ids[None], use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(made[:-1], ids[1:]).backward()
    module.torch, torch.Tensor.float = torch, narrow  # type: ignore[attr-defined, method-assign]
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        tensors = load_file(Path(saved) / "model.safetensors")
    made_of = {}
    for name, read_as in load_file(folder / "model.safetensors").items():
        if not name.endswith(FIXED):
            values = tensors[name].contiguous()
            if values.shape != read_as.shape:  # experts of Qwen3-VL, which version 5 turns on reading and leaves so
                values = values.transpose(1, 2).contiguous()
            made_of[name] = torch.from_numpy(in_directions(name, values.numpy()))
    return made_of


def main() -> None:
    """Make all files, or those of the models that are named."""
    for name in sys.argv[1:] or IN_TRANSFORMERS_5:
        with tempfile.TemporaryDirectory() as place:
            checkpoints.write(name, Path(place))
            tensors = logits(Path(place))
            tensors |= {f"gradient.{tensor}": values for tensor, values in gradients(Path(place)).items()}
        made = {f"{name}.{key}": values.contiguous() for key, values in tensors.items()}
        metadata = {"made_with": f"transformers {transformers.__version__}, torch {torch.__version__}"}
        (HERE / "results" / f"{name}.safetensors").write_bytes(save(made, metadata))
        print(f"{name}: {len(made)} tensors")


if __name__ == "__main__":
    main()
