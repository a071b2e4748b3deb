"""Models that other programs fetched: used where they lie, and never changed.

hf:ORG/REPO                          in Hugging Face's cache (of transformers, vLLM, llama.cpp), if it is whole there
.../models--ORG--REPO                that cache's folder itself
ollama:qwen3:30b                     in Ollama's store
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from quadriga.errors import CatalogueError
from quadriga.hub import repository
from quadriga.hub.repository import HubName
from quadriga.io import weight_names

_log = logging.getLogger("quadriga.hub")

OLLAMA = "ollama:"
_OLLAMA_NAME = re.compile(r"(?:[\w.-]+(?::\d+)?/)?(?:[\w.-]+/)?[\w.-]+(?::[\w.-]+)?")
_OLLAMA_HOST, _OLLAMA_LIBRARY = "registry.ollama.ai", "library"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json")


def in_hugging_face_cache(name: HubName) -> Path | None:
    """A model's folder or GGUF file in the cache of Hugging Face's client; None where it is not there, or not whole."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name.repository, revision=name.revision, local_files_only=True))
        sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        files, model = repository.chosen(sizes, name)
    except (OSError, ValueError, CatalogueError):  # of the client's own: not there; and no model in what is there
        return None
    if not _is_whole(folder, files, is_folder=not model):
        return None
    _log.info("%s lies in Hugging Face's cache and is used there: %s", name.repository, folder)
    return folder / model


def _is_whole(folder: Path, files: Sequence[str], *, is_folder: bool) -> bool:
    if weight_names.lacks_parts(files):
        return False
    if not is_folder:
        return True
    here = set(files)
    for index in (file for file in files if file.endswith(".safetensors.index.json")):
        try:
            needed = set(json.loads((folder / index).read_text())["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False
        if not needed <= here:
            return False
    has_vocabulary = any(file in _VOCABULARIES or file.endswith(".tiktoken") for file in files)
    return has_vocabulary and not here.isdisjoint({"config.json", "params.json"})


def snapshot_of(path: Path) -> Path:
    """The newest version in a folder models--ORG--REPO of Hugging Face's cache; any other path is itself.

    Raises:
        CatalogueError: the folder holds several versions, and none is the main branch's.
    """
    if not (path.name.startswith("models--") and (path / "snapshots").is_dir()):
        return path
    try:
        main = path / "snapshots" / (path / "refs" / "main").read_text().strip()
    except OSError:
        main = path
    versions = sorted((path / "snapshots").iterdir())
    if main in versions or len(versions) == 1:
        return main if main in versions else versions[0]
    raise CatalogueError(
        f"{path} must hold the main version of a model, or one version; it has {len(versions)} in snapshots/. Give the "
        "folder of one."
    )


def in_ollama(name: str) -> Path:
    """The GGUF file of a model that Ollama pulled, by its name there: ``qwen3:30b``, ``hf.co/ORG/REPO:Q4_K_M``.

    Raises:
        CatalogueError: no such model there, or one of a kind that is not read.
    """
    if _OLLAMA_NAME.fullmatch(name) is None or ".." in name:
        raise CatalogueError(f"names of Ollama's models must look like {OLLAMA}qwen3:30b, got {OLLAMA}{name[:100]!r}")
    *before, last = name.split("/")
    host, library = before if len(before) == 2 else (_OLLAMA_HOST, before[0] if before else _OLLAMA_LIBRARY)
    model, _, tag = last.partition(":")
    wanted = Path(host, library, model, tag or "latest")
    stores = [store for store in _ollama_stores() if (store / "manifests").is_dir()]
    for store in stores:
        if (store / "manifests" / wanted).is_file():
            return _blob(store, wanted, name)
    have = [_called(file) for store in stores for file in sorted((store / "manifests").glob("*/*/*/*"))]
    looked = ", ".join(map(str, stores or _ollama_stores()))
    raise CatalogueError(f"Ollama has no model {name!r} in {looked}. It has: {', '.join(have) or 'nothing'}.")


def _ollama_stores() -> list[Path]:
    given = os.environ.get("OLLAMA_MODELS")
    return [Path(given)] if given else [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]


def _called(manifest: Path) -> str:
    host, library, model, tag = manifest.parts[-4:]
    before = "" if (host, library) == (_OLLAMA_HOST, _OLLAMA_LIBRARY) else f"{library}/"
    return f"{'' if host == _OLLAMA_HOST else host + '/'}{before}{model}:{tag}"


def _blob(store: Path, wanted: Path, name: str) -> Path:
    manifest = store / "manifests" / wanted
    try:
        digests = [(layer["mediaType"].rpartition(".")[2], layer["digest"]) for layer in _layers(manifest)]
        blobs = [store / "blobs" / digest.replace(":", "-") for kind, digest in digests if kind == "model"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise CatalogueError(f"{manifest} is no manifest of Ollama's: pull {name} again") from None
    if any(kind == "adapter" for kind, _ in digests):
        raise CatalogueError(f"{name} is a model with an adapter in Ollama's form, which is not read")
    if len(blobs) != 1 or not blobs[0].is_file():
        raise CatalogueError(f"{name} must have one file of weights in {store / 'blobs'}: pull it again")
    return blobs[0]


def _layers(manifest: Path) -> list[dict[str, str]]:
    return list(json.loads(manifest.read_text())["layers"])
