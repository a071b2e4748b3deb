"""Repositories of the Hugging Face hub: their names, and which of their files are the model.

    hf:Qwen/Qwen3-30B-A3B                    safetensors, configuration and vocabulary
    hf:Qwen/Qwen3-30B-A3B@main               of one version
    hf:unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M     one GGUF of many, by its quantisation or its file's name

A repository holds what many programs want: the same weights in two layouts, in twenty quantisations, in a folder for
another program. One model is taken, and nothing twice. Never code, never pickles.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quadriga.errors import CatalogueError
from quadriga.hub.cache import full_disk, need_room, size_of
from quadriga.hub.download import Progress, watching
from quadriga.io import weight_names
from quadriga.io.quantised import BESIDE

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"hf:(?P<id>{_PART}/{_PART})(?:@(?P<revision>[\w./-]{{1,200}}))?(?::(?P<which>[\w./-]{{1,200}}))?")
_ADDRESS = re.compile(
    rf"(?:(?:https?://)?(?:www\.)?(?:huggingface|hf)\.co/)(?P<id>{_PART}/{_PART})(?P<rest>[@:][\w./:@-]*)?"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[\w.-]+)(?:/(?P<file>[\w./-]+))?)?/?(?:\?.*)?"
)

_DESCRIPTION = ("*.safetensors.index.json", "config.json", "generation_config.json", *BESIDE, "params.json")
_BESIDE_WEIGHTS = (
    *_DESCRIPTION,
    "tokenizer*.json",
    "tokenizer.model",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*.tiktoken",
    "LICENSE*",
)
_PREFERRED = "Q4_K_M"
"""What is taken of several GGUF files where nobody says: what llama.cpp and Ollama take."""


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A model on the hub.

    Attributes:
        repository: ORG/REPO.
        revision: a branch, tag or commit; None: the main branch.
        which: a quantisation or a file's name, where the repository has several GGUF files; None: nobody said.
    """

    repository: str
    revision: str | None
    which: str | None


def parse(name: str) -> HubName | None:
    """hf:ORG/REPO[@REVISION][:WHICH] in its parts; None for any other text."""
    found = _NAME.fullmatch(name)
    return found and HubName(repository=found["id"], revision=found["revision"], which=found["which"])


def from_address(text: str) -> str | None:
    """hf:ORG/REPO... for the address of a page of the hub (Ollama's clients write hf.co/ORG/REPO...); else None."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return None
    revision = f"@{found['revision']}" if found["revision"] else ""
    which = f":{found['file']}" if found["file"] else ""
    name = f"hf:{found['id']}{found['rest'] or ''}{revision}{which}"
    return name if parse(name) else None


def chosen(sizes: Mapping[str, int], name: HubName) -> tuple[list[str], str]:
    """Files of the repository that make up one model.

    Args:
        sizes: file -> bytes, of all the files in the repository.

    Returns:
        The files, and which of them is the model: the (first part of the) GGUF; empty where it is the folder.

    Raises:
        CatalogueError: no weights of a kind that is read, none that ``which`` names, or several and none preferred.
    """
    ggufs = weight_names.models(sizes)
    weights = _safetensors(sizes)
    if name.which is None and weights:
        beside = [file for file in sizes if any(_matches(file, kind) for kind in _BESIDE_WEIGHTS)]
        if not any(map(weight_names.is_copy, weights)):
            beside = [file for file in beside if not weight_names.is_copy(file)]
        return [*weights, *beside], ""
    if not ggufs:
        if weights:
            raise CatalogueError(f"{name.repository} has no GGUF files to choose {name.which!r} from. Leave it out.")
        raise CatalogueError(f"{name.repository} must have safetensors or GGUF weights, but has neither")
    parts = _one_of(ggufs, sizes, name)
    return [*parts, *(file for file in sizes if _matches(file, "LICENSE*"))], parts[0]


def _safetensors(sizes: Mapping[str, int]) -> list[str]:
    """Those beside the configuration; Mistral's own copy of the same weights only where there is no other."""
    return weight_names.without_copies([file for file in sizes if "/" not in file and file.endswith(".safetensors")])


def _matches(file: str, kind: str) -> bool:
    return file.count("/") == kind.count("/") and fnmatch.fnmatchcase(file, kind)


def _one_of(ggufs: list[list[str]], sizes: Mapping[str, int], name: HubName) -> list[str]:
    which = name.which or _PREFERRED
    found = [parts for parts in ggufs if _is_called(parts[0], which)]
    if len(found) == 1:
        return found[0]
    if name.which is None and len(ggufs) == 1:
        return ggufs[0]
    several = "several" if found else "none"
    asked = f"there are {several} that {name.which!r} names" if name.which or found else "they are several"
    raise CatalogueError(
        f"{name.repository} has GGUF files, and {asked}. Give one as hf:{name.repository}:WHICH, by its quantisation "
        f"or its file's name: {_listed(found or ggufs, sizes)}"
    )


def _is_called(file: str, which: str) -> bool:
    path = Path(file)
    names = {weight_names.quantisation(file), file, path.name, path.stem, *map(str, path.parents)} - {"."}
    return which.lower() in {one.lower() for one in names}


def _listed(ggufs: Sequence[list[str]], sizes: Mapping[str, int]) -> str:
    labels = [weight_names.quantisation(parts[0]) for parts in ggufs]
    names = [
        label if label and labels.count(label) == 1 else parts[0] for label, parts in zip(labels, ggufs, strict=True)
    ]
    totals = [sum(sizes[part] for part in parts) for parts in ggufs]
    return ", ".join(f"{one} ({_size(total)})" for one, total in zip(names, totals, strict=True))


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def fetch(name: HubName, staged: Path, progress: Progress | None) -> str:
    """Download a model into a folder, which goes on where an earlier attempt stopped.

    Returns:
        As the second value of :func:`chosen`.

    Raises:
        CatalogueError: no such repository, no network, no model in it, or a full disk. Finished files stay.
    """
    import huggingface_hub

    with _asking(name, staged.parent):
        facts = huggingface_hub.HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in facts.siblings or ()}
        files, model = chosen(sizes, name)
        total = sum(sizes[file] for file in files)
        need_room(staged.parent, total - size_of(staged))
        label = f"{name.repository} {weight_names.quantisation(model)}".rstrip()
        if progress is not None:
            progress(0, total, label)
        with watching(staged, total, label, progress):
            huggingface_hub.snapshot_download(
                name.repository,
                revision=facts.sha or name.revision,  # the version that was listed, also if it changes meanwhile
                local_dir=staged,
                allow_patterns=[glob.escape(file) for file in files],
            )
    missing = [file for file in files if not (staged / file).is_file()]
    if missing:
        raise CatalogueError(f"{name.repository}: {missing[0]} did not come. The same command tries again.")
    return model


def fetch_description(name: HubName, staged: Path) -> None:
    """Download the configuration and the index of the weights into a folder that :func:`fetch` may go on with.

    Raises:
        CatalogueError: no such repository, no network, or a repository without a configuration, as those of GGUF files.
    """
    import huggingface_hub

    with _asking(name, staged.parent):
        huggingface_hub.snapshot_download(
            name.repository, revision=name.revision, local_dir=staged, allow_patterns=list(_DESCRIPTION)
        )
    if name.which or not any((staged / file).is_file() for file in ("config.json", "params.json")):
        raise CatalogueError(
            f"{name.repository} has no config.json that says what the model is; its weights do: fetch them first "
            "(`quadriga pull`)"
        )


@contextlib.contextmanager
def _asking(name: HubName, folder: Path) -> Iterator[None]:
    """The hub's client without its own progress bars, and with errors that say what to do."""
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shows = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    except CatalogueError:
        raise
    except errors.GatedRepoError:
        raise CatalogueError(
            f"{name.repository} is gated: accept its terms on its page, and log in with the hub's own client"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CatalogueError(
            f"the hub has no repository {name.repository}, or it is a private one: check the name, or log in with the "
            "hub's own client"
        ) from None
    except errors.RevisionNotFoundError:
        raise CatalogueError(f"{name.repository} has no version {name.revision!r}") from None
    except Exception as error:  # others of the client's own, those of its requests, and OS errors
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full_disk(folder) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(". ")
        raise CatalogueError(
            f"could not download {name.repository} from the hub: {reason}. Check the network; finished files are kept, "
            "and the same command goes on."
        ) from None
    finally:
        if shows:
            enable_progress_bars()
