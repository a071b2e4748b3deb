"""The weight files in Meta's and Mistral's own folders, beside their params.json. No torch, no weights.

consolidated.00.pth ... 07.pth           Meta: a file for each process the model was cut up for; Mistral 7B: one
consolidated.00.pt ... 07.pt             Mixtral's first release
consolidated.safetensors, consolidated-00001-of-00003.safetensors         Mistral since
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from quadriga.errors import CheckpointError
from quadriga.io.torch_zip import read_tensors

TABLE = "tok_embeddings.weight"
_PATTERNS = (
    r"consolidated(\.\d{2})?\.safetensors|consolidated-\d{5}-of-\d{5}\.safetensors",
    r"consolidated\.\d{2}\.pth",
    r"consolidated\.\d{2}\.pt",
)
"""Where a folder has several, the first: safetensors cannot run code."""


def weight_files(folder: Path) -> list[Path]:
    """The files of the model, in the order of their numbers.

    Raises:
        CheckpointError: there are none, or one is missing.
    """
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    for pattern in _PATTERNS:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            _check_numbers(folder, found)
            return [folder / name for name in found]
    raise CheckpointError(
        f"{folder} has a params.json and no weights beside it: it needs consolidated.00.pth and so on, or "
        "consolidated.safetensors"
    )


def _check_numbers(folder: Path, names: list[str]) -> None:
    """Of files that are numbered, none may be missing in between."""
    parts = [re.findall(r"\d+", name) for name in names]
    numbered = [int(part[0]) for part in parts if part]
    first = 1 if any(len(part) == 2 for part in parts) else 0
    count = int(parts[0][1]) if first else len(numbered)
    missing = sorted(set(range(first, first + count)) - set(numbered))
    if numbered and (missing or len(numbered) != count):
        raise CheckpointError(f"{folder}: of {names[0]} and its kin, number {missing[:4]} is missing; fetch it again")


def table_rows(folder: Path, d_model: int) -> int:
    """The size of the vocabulary, where params.json leaves it to the files: rows of the whole embedding table.

    Raises:
        CheckpointError: no files, or none that say it.
    """
    shapes = []
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{folder}: params.json must give vocab_size beside {path.name}")
        fd = os.open(path, os.O_RDONLY)
        try:
            table = read_tensors(fd, path.name).get(TABLE)
        finally:
            os.close(fd)
        if table is None or len(table.shape) != 2:
            raise CheckpointError(f"{path.name} must hold the matrix {TABLE}")
        shapes.append(table.shape)
    # LLaMA-1 and -2 share its columns out, LLaMA-3 its rows.
    by_columns = sum(columns for _, columns in shapes) == d_model
    return shapes[0][0] if by_columns else sum(rows for rows, _ in shapes)
