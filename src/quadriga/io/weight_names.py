"""What the names of weight files say: parts of one file, the quantisation, and files that a model does not need.

Qwen3-30B-A3B-Q4_K_M.gguf                       model, Q4_K_M
UD-Q8_K_XL/GLM-4.5-UD-Q8_K_XL-00001-of-00004.gguf   first of four parts of a model, UD-Q8_K_XL
mmproj-F16.gguf, imatrix_unsloth.gguf           no models
consolidated.safetensors                        the same weights once more, where there are others (Mistral)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""(name without the number, number from 1, how many), the way llama.cpp's gguf-split names parts."""

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")

_QUANTISATION = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q\d+(?:_[A-Za-z0-9]+)*|TQ\d_0|BF16|FP?16|FP?32|MXFP4(?:_MOE)?|NVFP4)(?![A-Za-z0-9])",
    re.IGNORECASE,
)


def models(names: Iterable[str]) -> list[list[str]]:
    """The models among files: each a list of its parts in order, one for a file that is whole; sorted by first part.

    Projectors of pictures and importance matrices are left out by their names, as are files that are no GGUF.
    """
    whole: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePath(name)
        if path.suffix == ".gguf" and not _is_beside(path.stem.lower()):
            part = PART.fullmatch(name)
            whole.setdefault(f"{part[1]}-of-{part[3]}" if part else name, []).append(name)
    return list(whole.values())


def _is_beside(stem: str) -> bool:
    """A projector, or a matrix itself: models that were quantised with one may say so behind their quantisation."""
    return "mmproj" in stem or ("imatrix" in stem and _QUANTISATION.search(stem) is None)


def quantisation(name: str) -> str:
    """Q4_K_M, UD-Q2_K_XL, BF16, MXFP4, ... as the file's name, or else its folder's, says; empty where neither does."""
    for part in reversed(PurePath(name).parts):
        found = _QUANTISATION.findall(part)
        if found:
            return str(found[-1]).upper()
    return ""


def parts_here(path: Path) -> list[Path]:
    """All parts of a file that lie beside it, in order; the file itself where it is whole."""
    part = PART.fullmatch(path.name)
    if part is None:
        return [path]
    names = (PART.fullmatch(file.name) for file in path.parent.glob("*.gguf"))
    return sorted(path.with_name(name[0]) for name in names if name and (name[1], name[3]) == (part[1], part[3]))


def lacks_parts(names: Sequence[str]) -> bool:
    """True if a file is one of several, GGUF or safetensors, and not all of them are among the names."""
    split = {found.groups() for found in map(_SHARD.fullmatch, names) if found}
    parts = {f"{stem}-{i:05d}-of-{n}{suffix}" for stem, n, suffix in split for i in range(1, int(n) + 1)}
    return not parts <= set(names)


def is_copy(name: str) -> bool:
    """True for Mistral's own form of a model, which its repositories hold beside Hugging Face's."""
    return name.startswith("consolidated")


def without_copies(names: Sequence[str]) -> list[str]:
    """Weight files without Mistral's own copy; with it where there is nothing else."""
    return [name for name in names if not is_copy(name)] or list(names)
