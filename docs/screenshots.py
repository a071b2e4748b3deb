"""The pictures of the chat page in README and docs/chat-page.md, taken of the page as it runs.

python docs/screenshots.py                   writes docs/images/chat-page-lens.png and docs/images/chat-page-phone.png
python docs/screenshots.py --serve moe       serves one of the two models and waits, to look around

The chat is the default model's. The lens needs a mixture of experts small enough for any machine, so it looks at the
same model upcycled: every feed-forward network becomes 16 experts that share its weights, and a router with random
weights chooses 4. In exact arithmetic it computes what the dense model does, since equal experts with weights that sum
to one add up to one of them; what the lens shows is a real router at work on real states, though one never trained.

Needs playwright and a Chromium (``--chromium``, by default the one in the path).
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import quadriga
from quadriga import LLM
from quadriga.hub import catalogue
from quadriga.io.open import open_checkpoint
from quadriga.io.packed import load_packed
from quadriga.kernels.arrays import array
from quadriga.kernels.cpu.packing import Packed, Parameter, pack
from quadriga.model.config import MoESpec
from quadriga.runners.compiled import CompiledModel
from quadriga.server.guard import Limits
from quadriga.server.run import listen, serve
from quadriga.server.service import Service

IMAGES = Path(__file__).parent / "images"
MAX_BYTES = 300_000
N_EXPERTS, TOP_K = 16, 4
ROUTER_STD = 0.25  # neither a fixed choice nor a coin toss

CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def upcycled() -> LLM:
    """The default model with its feed-forward networks as experts; see the module docstring."""
    opened = open_checkpoint(catalogue.resolve(catalogue.DEFAULT_MODEL))
    dense = opened.config
    ffn = dense.only_layer("this page").ffn
    moe = MoESpec(d_ff=ffn.d_ff, n_experts=N_EXPERTS, top_k=TOP_K, activation=ffn.activation)
    config = replace(dense.with_layers(lambda layer: replace(layer, ffn=moe)), family="mixtral")
    generator = torch.Generator().manual_seed(4)
    parameters: dict[str, Parameter] = {}
    for name, values in load_packed(opened, "keep").parameters.items():
        if ".ffn." not in name:
            parameters[name] = values
            continue
        assert isinstance(values, Packed)
        parameters[name.replace(".ffn.", ".moe.")] = [values] * N_EXPERTS
        router = name.split(".ffn.")[0] + ".moe.router.weight"
        if router not in parameters:
            weights = torch.empty(N_EXPERTS, config.d_model).normal_(0, ROUTER_STD, generator=generator)
            parameters[router] = pack(array(weights), "float32")
    runner = CompiledModel(config, parameters, threads=2, n_blocks=1024, activations="int16")
    return LLM(runner, opened.load_tokenizer(catalogue.cl100k_ranks), name="smollm2-upcycled-16x135m")


@contextmanager
def served(llm: LLM, name: str, port: int = 0) -> Iterator[str]:
    """A server in a thread of this process, which ends with it; its address."""
    listener, up = listen("127.0.0.1", port), threading.Event()
    service = Service(llm, name=name)
    threading.Thread(target=serve, args=(service, Limits(), listener), kwargs={"started": up.set}, daemon=True).start()
    assert up.wait(30), "the server starts"
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"


MODELS = {
    "dense": lambda: (quadriga.load(catalogue.DEFAULT_MODEL), catalogue.DEFAULT_MODEL),
    "moe": lambda: (upcycled(), "smollm2-upcycled-16x135m"),
}


def ask(page: Any, text: str) -> None:
    """Send a message and wait for the whole answer."""
    page.fill("#composer", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant[data-last=true][aria-busy=true]")
    page.wait_for_selector(".message.assistant[data-last=true][aria-busy=false]", timeout=240_000)


def settings(page: Any, **changes: object) -> None:
    """Settings as if chosen before; greedy, so that the pictures are the same each time."""
    sampling = {"temperature": 0, "repetition_penalty": 1.1, "max_tokens": 220}
    page.add_init_script(f"localStorage.setItem('quadriga.settings', {quoted(changes | {'sampling': sampling})})")


def quoted(value: object) -> str:
    """JSON as a string literal of JavaScript."""
    return json.dumps(json.dumps(value))


def lens_picture(browser: Any, url: str, out: Path) -> None:
    """Light, 1280 wide: the lens on an answer, a token's card open, the load map beside it."""
    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light", locale="en-US")
    settings(page, theme="light", locale="en", lens=True)
    page.goto(url)
    page.click(".top nav [aria-label='Experts at work']")
    ask(page, "Why is the sky blue? Answer in two sentences.")
    page.fill(".lens-bar input[type=range]", "11")
    page.wait_for_timeout(2500)
    page.locator("[data-token='5']").first.click()
    page.mouse.move(700, 790)
    page.wait_for_timeout(600)
    page.screenshot(path=out)


def phone_picture(browser: Any, url: str, out: Path) -> None:
    """Dark, 390 wide, in Chinese: a chat with the default model."""
    page = browser.new_page(
        viewport={"width": 390, "height": 844},
        device_scale_factor=2,
        color_scheme="dark",
        locale="zh-CN",
        has_touch=True,
    )
    settings(page, theme="dark", locale="zh-CN")
    page.goto(url)
    ask(page, "Write a Python function that reverses a string.")
    page.wait_for_timeout(400)
    page.screenshot(path=out)


def main() -> None:
    """Parse the command line; serve, or take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=MODELS, help="only serve this model")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--out", type=Path, default=IMAGES, help="where the pictures go")
    args = parser.parse_args()
    if args.serve:
        with served(*MODELS[args.serve](), args.port) as url:
            print(url, flush=True)
            threading.Event().wait()
    from playwright.sync_api import sync_playwright

    args.out.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=CHROMIUM_ARGS)
        for kind, name, take in (("moe", "lens", lens_picture), ("dense", "phone", phone_picture)):
            out = args.out / f"chat-page-{name}.png"
            with served(*MODELS[kind]()) as url:
                take(browser, url, out)
            size = out.stat().st_size
            assert size < MAX_BYTES, f"{out} has {size} bytes"
            print(out, size)


if __name__ == "__main__":
    main()
