"""Models from the hub: what of a repository is fetched, under which names. The hub's client is replaced by a local fake."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from httpx import Request, Response
from huggingface_hub import errors
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from quadriga.cli.info_report import load_config
from quadriga.errors import CatalogueError
from quadriga.hub import repository
from quadriga.hub.catalogue import cached, described, remove, resolve, source_of, verify
from quadriga.hub.repository import HubName
from quadriga.model.families import family_of, preset

TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub of one repository, and a cache of its own. Returns a function that sets its files; it returns the calls."""
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path))
    calls: list[dict[str, Any]] = []

    def publish(files: dict[str, bytes], *, lost: str = "") -> list[dict[str, Any]]:
        class HfApi:
            def model_info(self, name: str, *, revision: str | None, files_metadata: bool) -> SimpleNamespace:
                assert files_metadata
                calls.append({"listed": name, "revision": revision})
                siblings = [SimpleNamespace(rfilename=file, size=len(content)) for file, content in files.items()]
                return SimpleNamespace(siblings=siblings, sha="c0ffee")

        def snapshot_download(
            name: str,
            *,
            revision: str | None,
            local_dir: Path = tmp_path,
            allow_patterns: Sequence[str] = (),
            local_files_only: bool = False,
        ) -> None:
            if local_files_only:  # tests/hub/test_elsewhere.py
                raise FileNotFoundError(name)
            calls.append({"fetched": name, "revision": revision, "patterns": allow_patterns})
            for file, content in {**files, ".cache/lock": b""}.items():
                allowed = any(fnmatch.fnmatchcase(file, pattern) for pattern in allow_patterns)
                if file != lost and (allowed or file == ".cache/lock"):
                    path = Path(local_dir) / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)

        monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return publish


def test_a_repository_is_fetched_once_in_the_version_that_was_listed(hub: Any) -> None:
    calls = hub({"config.json": b"{}", "model.safetensors": b"x" * 100, "modeling.py": b"!", "model.bin": b"!"})
    folder = resolve("hf:org/model@v1.0")
    assert calls == [
        {"listed": "org/model", "revision": "v1.0"},
        {"fetched": "org/model", "revision": "c0ffee", "patterns": ["model.safetensors", "config.json"]},
    ]
    assert resolve("hf:org/model@v1.0") == folder == resolve("https://huggingface.co/org/model/tree/v1.0")
    assert len(calls) == 2
    assert verify("hf:org/model@v1.0") == []
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "entry.json", "model.safetensors"]


def test_what_a_model_is_comes_without_its_weights(hub: Any) -> None:
    config = json.dumps(family_of(preset("llama2-7b")).config_to_hf(preset("llama2-7b"))).encode()
    calls = hub({"config.json": config, "model.safetensors": b"x" * 100, "tokenizer.json": b"{}"})
    assert load_config("https://huggingface.co/org/model/tree/v1") == preset("llama2-7b")
    (call,) = calls
    assert "config.json" in call["patterns"] and "*.safetensors.index.json" in call["patterns"]
    assert not any(
        fnmatch.fnmatchcase(file, kind) for file in ("model.safetensors", "a.gguf") for kind in call["patterns"]
    )
    assert cached() == []
    assert (resolve("hf:org/model@v1") / "model.safetensors").is_file() and cached()[0].name == "hf:org/model@v1"
    assert described("hf:org/model@v1") == resolve("hf:org/model@v1") and len(calls) == 3
    hub({"a-Q8_0.gguf": b"x", "LICENSE": b""})
    with pytest.raises(CatalogueError, match=r"org/g has no config.json .*`quadriga pull`"):
        described("hf:org/g")


def test_one_of_many_gguf_files_is_a_file_by_its_own_name(hub: Any) -> None:
    files = {
        "README.md": b"",
        "LICENSE": b"free",
        "m-Q8_0.gguf": b"8" * 80,
        "UD-Q2_K_XL/m-UD-Q2_K_XL-00001-of-00002.gguf": b"2" * 7,
        "UD-Q2_K_XL/m-UD-Q2_K_XL-00002-of-00002.gguf": b"2" * 13,
    }
    calls = hub(files)
    path = resolve("hf:org/m-GGUF:ud-q2_k_xl")
    assert path.read_bytes() == b"2" * 7 and path.with_name(path.name.replace("00001", "00002")).is_file()
    assert not list(path.parents[1].glob("*.gguf"))
    assert resolve("hf:org/m-GGUF:ud-q2_k_xl") == path and len(calls) == 2
    assert resolve("hf:org/m-GGUF:m-Q8_0.gguf").read_bytes() == b"8" * 80
    found = {model.name: (model.path, model.nbytes) for model in cached()}
    assert found["hf:org/m-GGUF:ud-q2_k_xl"] == (path, 24)
    assert remove("hf:org/m-GGUF:ud-q2_k_xl") > 20 and not path.exists()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (errors.RepositoryNotFoundError, "the hub has no repository org/model, or it is a private one"),
        (errors.GatedRepoError, "org/model is gated: accept its terms"),
        (errors.RevisionNotFoundError, "org/model has no version 'v7'"),
        (errors.HfHubHTTPError, "could not download org/model from the hub: no. Check the network"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(
    hub: Any, monkeypatch: pytest.MonkeyPatch, kind: type[errors.HfHubHTTPError], says: str
) -> None:
    def model_info(*arguments: object, **options: object) -> None:
        assert are_progress_bars_disabled()
        raise kind("no.", response=Response(404, request=Request("GET", "https://huggingface.co")))  # type: ignore[arg-type]

    hub({})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(CatalogueError, match=says):
        resolve("hf:org/model@v7")
    assert not are_progress_bars_disabled()


def test_what_did_not_come_is_no_model(hub: Any) -> None:
    hub({"config.json": b"{}", "model.safetensors": b"x"}, lost="model.safetensors")
    with pytest.raises(CatalogueError, match=r"org/model: model.safetensors did not come"):
        resolve("hf:org/model")
    assert cached() == []


def chosen(files: list[str], which: str | None = None) -> tuple[list[str], str]:
    found, model = repository.chosen(
        {file: 10**9 * i for i, file in enumerate(files, 1)}, HubName(repository="o/r", revision=None, which=which)
    )
    return sorted(found), model


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        # as OpenAI and Meta publish: the same weights again for another program
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
         ["original/model.safetensors", "original/config.json", "metal/model.bin", "original/tokenizer.model"]),
        # as Mistral publishes
        (["model.safetensors", "params.json", "tekken.json"],
         ["consolidated.safetensors", "consolidated.safetensors.index.json"]),
        (["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors", "params.json",
          "consolidated.safetensors.index.json"], []),
        # weights for other programs beside the tensors, code, pickles, pictures
        (["model.safetensors", "quantize_config.json", "additional_chat_templates/tool_use.jinja"],
         ["r-Q4_K_M.gguf", "onnx/model.onnx", "modeling_r.py", "pytorch_model.bin", "a.png", "onnx/config.json"]),
    ],
)  # fmt: skip
def test_the_folder_of_a_model_and_nothing_twice(files: list[str], left_out: list[str]) -> None:
    assert chosen([*left_out, *files, *TEXTS]) == (sorted([*files, *TEXTS]), "")


GGUFS = ["a-Q4_K_M.gguf", "a-Q4_K_S.gguf", "a-IQ4_XS.gguf", "a-UD-Q4_K_XL.gguf", "BF16/a-BF16-00001-of-00002.gguf",
         "BF16/a-BF16-00002-of-00002.gguf", "mmproj-F16.gguf", "imatrix_unsloth.gguf", "config.json"]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "which", "taken"),
    [
        (GGUFS, None, ["a-Q4_K_M.gguf"]),
        (GGUFS, "Q4_K_M", ["a-Q4_K_M.gguf"]),
        (GGUFS, "iq4_xs", ["a-IQ4_XS.gguf"]),
        (GGUFS, "UD-Q4_K_XL", ["a-UD-Q4_K_XL.gguf"]),
        (GGUFS, "a-Q4_K_S", ["a-Q4_K_S.gguf"]),
        (GGUFS, "BF16", ["BF16/a-BF16-00001-of-00002.gguf", "BF16/a-BF16-00002-of-00002.gguf"]),
        (["Q8_0/a-00001-of-00001.gguf", "Q4_0/a-00001-of-00001.gguf"], "q8_0", ["Q8_0/a-00001-of-00001.gguf"]),
        (["gpt-oss-20b-mxfp4.gguf", "mmproj.gguf"], None, ["gpt-oss-20b-mxfp4.gguf"]),
        (["tiny.gguf"], None, ["tiny.gguf"]),
        (["m.imatrix.gguf", "m-Q4_K_M-imatrix.gguf"], None, ["m-Q4_K_M-imatrix.gguf"]),
        (["model.safetensors", "config.json", "a-Q5_0.gguf"], "Q5_0", ["a-Q5_0.gguf"]),
    ],
)
def test_one_gguf_of_many(files: list[str], which: str | None, taken: list[str]) -> None:
    assert chosen(files, which) == (taken, taken[0])


@pytest.mark.parametrize(
    ("files", "which", "says"),
    [
        (["config.json", "pytorch_model.bin"], None, "must have safetensors or GGUF weights, but has neither"),
        (["mmproj-F16.gguf"], None, "must have safetensors or GGUF weights"),
        (["a-Q8_0.gguf", "a-Q6_K.gguf"], None,
         r"they are several. Give one as hf:o/r:WHICH, .*name: Q6_K \(2.0 GB\), Q8_0 \(1.0 GB\)"),
        (GGUFS, "Q3_K_M", r"there are none that 'Q3_K_M' names.*BF16 \(11.0 GB\), IQ4_XS \(3.0 GB\), Q4_K_M"),
        (GGUFS, "Q4_K", "there are none that 'Q4_K' names"),
        (["a-base-Q4_K_M.gguf", "a-chat-Q4_K_M.gguf"], "Q4_K_M",
         r"several that 'Q4_K_M' names.*: a-base-Q4_K_M.gguf \(1.0 GB\), a-chat-Q4_K_M.gguf \(2.0 GB\)"),
        (["model.safetensors", "config.json"], "Q4_K_M", "o/r has no GGUF files to choose 'Q4_K_M' from"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_says_what_is_there(files: list[str], which: str | None, says: str) -> None:
    with pytest.raises(CatalogueError, match=says):
        chosen(files, which)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf.co/org/m-GGUF:Q4_K_M", "hf:org/m-GGUF:Q4_K_M"),
        ("huggingface.co/org/m", "hf:org/m"),
        ("https://huggingface.co/org/m", "hf:org/m"),
        ("https://huggingface.co/org/m/", "hf:org/m"),
        ("https://huggingface.co/org/m/tree/main", "hf:org/m@main"),
        ("https://huggingface.co/org/m/resolve/main/sub/m-Q8_0.gguf?download=true", "hf:org/m@main:sub/m-Q8_0.gguf"),
        ("https://huggingface.co/org", None),
        ("https://example.org/org/m", None),
        ("nothuggingface.co/org/m", None),
        ("hf.co/org/m/../../x", None),
    ],
)
def test_addresses_of_the_hubs_pages(text: str, name: str | None) -> None:
    assert repository.from_address(text) == name
    if name is not None:
        assert source_of(text) == name


def test_names_have_three_parts() -> None:
    assert repository.parse("hf:a/b-1.5@refs/pr/3:Q4_K_M") == HubName(
        repository="a/b-1.5", revision="refs/pr/3", which="Q4_K_M"
    )
    assert [repository.parse(name) for name in ("a/b", "hf:a", "hf:a/b:", "hf:a/b@", "hf:a/b/c", "hf:a/b:x y")] == [
        None
    ] * 6
