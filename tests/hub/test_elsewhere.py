"""Models in the stores of other programs: Hugging Face's cache as its own client reads it, and Ollama's."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from quadriga.errors import CatalogueError
from quadriga.hub.catalogue import cached, resolve
from quadriga.server.offers import called

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"weight_map": dict(zip(("a", "b"), SHARDS, strict=True))}
FOLDER = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    **dict.fromkeys(SHARDS, b"x"),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of Hugging Face's client, and an empty one of ours; nothing can be downloaded."""

    class HfApi:
        def model_info(self, name: str, **options: object) -> None:
            raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path / "ours"))
    return tmp_path / "hf"


def put(cache: Path, repository: str, files: dict[str, bytes], *, commit: str = COMMIT, branch: str = "main") -> Path:
    """As the client stores files: contents under their hashes, a folder of links for each commit, a file each branch."""
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    for folder in (place / "blobs", place / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for number, (name, content) in enumerate(files.items()):
        blob = place / "blobs" / f"{commit[:4]}{number}"
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    (place / "refs" / branch).write_text(commit)
    return snapshot


def test_a_whole_model_of_hugging_faces_cache_is_used_where_it_lies(cache: Path) -> None:
    snapshot = put(cache, "org/m", FOLDER)
    assert resolve("hf:org/m") == resolve(f"hf:org/m@{COMMIT}") == resolve(str(snapshot.parents[1])) == snapshot
    assert cached() == []
    with pytest.raises(CatalogueError, match="no network"):
        resolve("hf:org/m@v2")


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", SHARDS[0], SHARDS[1]])
@pytest.mark.parametrize("indexed", [True, False])
def test_what_is_not_whole_there_is_downloaded(cache: Path, lost: str, indexed: bool) -> None:
    without = {lost} if indexed else {lost, "model.safetensors.index.json"}
    put(cache, "org/m", {name: content for name, content in FOLDER.items() if name not in without})
    with pytest.raises(CatalogueError, match="no network"):
        resolve("hf:org/m")


def test_an_index_says_what_is_missing_where_names_do_not(cache: Path) -> None:
    index = json.dumps({"weight_map": {"a": "dense.safetensors", "b": "experts.safetensors"}}).encode()
    files = {
        **{name: FOLDER[name] for name in ("config.json", "tokenizer.json")},
        "model.safetensors.index.json": index,
    }
    put(cache, "org/half", files | {"dense.safetensors": b"x"})
    put(cache, "org/whole", files | {"dense.safetensors": b"x", "experts.safetensors": b"x"})
    assert resolve("hf:org/whole").is_dir()
    with pytest.raises(CatalogueError, match="no network"):
        resolve("hf:org/half")


def test_gguf_files_of_the_cache(cache: Path) -> None:
    names = ["m-Q8_0.gguf", "BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]
    snapshot = put(cache, "org/g", dict.fromkeys(names, b"x"))
    assert resolve("hf:org/g:Q8_0") == snapshot / names[0]
    assert resolve("hf:org/g:bf16") == snapshot / names[1]
    (snapshot / names[2]).unlink()
    for name in ("hf:org/g:bf16", "hf:org/g:Q4_K_M"):
        with pytest.raises(CatalogueError, match="no network"):
            resolve(name)


def test_a_folder_of_versions_is_its_main_one(cache: Path) -> None:
    old = put(cache, "org/m", FOLDER, commit="a" * 40, branch="v1")
    place = old.parents[1]
    assert resolve(str(place)) == old
    new = put(cache, "org/m", FOLDER, commit="b" * 40, branch="v2")
    with pytest.raises(CatalogueError, match=r"it has 2 in snapshots/. Give the folder of one"):
        resolve(str(place))
    (place / "refs" / "main").write_text(f"{new.name}\n")
    assert resolve(str(place)) == new


def manifest(store: Path, where: str, **layers: str) -> None:
    file = store / "manifests" / where
    file.parent.mkdir(parents=True, exist_ok=True)
    kinds = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"}
        for kind, digest in layers.items()
    ]
    file.write_text(json.dumps({"schemaVersion": 2, "layers": kinds}))
    (store / "blobs").mkdir(exist_ok=True)
    for digest in layers.values():
        (store / "blobs" / f"sha256-{digest}").write_bytes(b"GGUF")


def test_ollamas_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    manifest(tmp_path, "registry.ollama.ai/library/qwen3/30b", template="aa", model="bb", license="cc")
    manifest(tmp_path, "registry.ollama.ai/library/qwen3/latest", model="dd")
    manifest(tmp_path, "registry.ollama.ai/me/mine/latest", model="ee")
    manifest(tmp_path, "hf.co/org/m-GGUF/Q4_K_M", model="ff")
    manifest(tmp_path, "registry.ollama.ai/library/tuned/latest", model="bb", adapter="gg")
    for name, digest in [
        ("qwen3:30b", "bb"),
        ("qwen3", "dd"),
        ("me/mine", "ee"),
        ("hf.co/org/m-GGUF:Q4_K_M", "ff"),
        ("registry.ollama.ai/library/qwen3:30b", "bb"),
    ]:
        assert resolve(f"ollama:{name}") == tmp_path / "blobs" / f"sha256-{digest}", name
    assert [called(name) for name in ("ollama:qwen3:30b", "hf:org/m-GGUF:Q4_K_M")] == ["qwen3-30b", "m-GGUF-Q4_K_M"]
    (tmp_path / "blobs" / "sha256-dd").unlink()
    (tmp_path / "manifests/registry.ollama.ai/library/broken").mkdir()
    (tmp_path / "manifests/registry.ollama.ai/library/broken/latest").write_text("{}")
    for name, says in [
        (
            "qwen3:8b",
            r"no model 'qwen3:8b' in .* It has: hf.co/org/m-GGUF:Q4_K_M, broken:latest, qwen3:30b, qwen3:latest",
        ),
        ("qwen3", "must have one file of weights"),
        ("tuned", "with an adapter"),
        ("broken", "no manifest of Ollama's: pull broken again"),
        ("../../x", "must look like ollama:qwen3:30b"),
        ("", "must look like"),
    ]:
        with pytest.raises(CatalogueError, match=says):
            resolve(f"ollama:{name}")
