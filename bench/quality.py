"""Quality at equal bytes: our formats, with and without what calibration gives them, beside llama.cpp's types.

Every file is measured by the same program, its numbers taken exactly (float32): perplexity, KL divergence from the
float32 model (mean and 99.9 %) and how often both find the same token most probable, over the second half of each
window, as ``quadriga divergence`` has them. Both sides are calibrated on the same tokens of the same text: llama-
quantize reads the matrix that ``quadriga imatrix`` would write.

    python bench/quality.py smollm2-135m-instruct --text test.txt --calibrate valid.txt \\
        --quantize llama-quantize --types Q2_K Q3_K_M Q4_K_M Q5_K_M --work quality --csv out.csv

For each of llama.cpp's types: its file with the importance matrix; ours of the same type with that matrix and with
feedback; and our budget of the same bytes of weights, as a GGUF file and with ``--packed`` as a packed directory too.
``--sizes`` adds packed budgets of other sizes, in MB, ``--formats`` packed formats for all matrices, with plain search,
with columns weighed, and with feedback. What lies in WORK is not made again.
"""

from __future__ import annotations

import argparse
import csv
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

import quadriga
from quadriga.edits.calibrate import Calibration, calibrate
from quadriga.edits.format_errors import GGUFErrors, PackedErrors
from quadriga.evaluate import divergence
from quadriga.hub import catalogue
from quadriga.io.conversion_plan import recipe_rest
from quadriga.io.convert import write
from quadriga.io.directory import read_manifest
from quadriga.io.gguf_source import GGUFSource
from quadriga.io.imatrix import read_imatrix
from quadriga.io.imatrix_write import TextRead, write_imatrix
from quadriga.io.open import open_checkpoint
from quadriga.quant.feedback import Importance, columns_of
from quadriga.quant.format_choice import Candidate, choose

COLUMNS = ("variant", "weight_bytes", "bits", "perplexity", "mean_kl", "kl_99.9", "same_top", "expected_kl", "seconds")


def weight_bytes(path: Path) -> int:
    """Bytes of all tensors, without metadata and vocabulary."""
    if path.is_dir():
        return sum(entry.nbytes for entry in read_manifest(path).parameters.values())
    source = GGUFSource(path)
    try:
        return sum(tensor.nbytes for tensor in source.tensors.values())
    finally:
        source.close()


class Both:
    """The errors of packed formats and of GGUF's, measured in one pass."""

    def __init__(self, *kinds: PackedErrors | GGUFErrors) -> None:
        self._kinds = kinds

    def add(self, name: str, weight: Tensor, cost: Tensor, how: Importance, judge: Importance) -> None:
        """See ``FormatErrors``."""
        for kind in self._kinds:
            kind.add(name, weight, cost, how, judge)

    def candidates(self) -> dict[str, list[Candidate]]:
        """See ``FormatErrors``; they are asked one by one."""
        return {}


class Maker:
    """Makes the files, each once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.checkpoint = open_checkpoint(catalogue.resolve(args.model))
        self.base = self.ours("base.gguf", to="gguf", gguf_format="float32")[0]
        tokenizer = self.checkpoint.load_tokenizer(catalogue.cl100k_ranks)
        assert tokenizer is not None, "a text needs a tokenizer"
        ids = tokenizer.encode(args.calibrate.read_text(encoding="utf-8"))[: args.calibrate_tokens]
        self.errors: dict[str, PackedErrors | GGUFErrors] = {"gguf": GGUFErrors(self.checkpoint.config)}
        if args.packed or args.sizes:
            self.errors["quadriga"] = PackedErrors(self.checkpoint.config)
        self.found = self._calibrated(ids)
        self.imatrix = self.work / "imatrix.gguf"
        if not self.imatrix.exists():
            text = TextRead(args.calibrate.name, -(-len(ids) // self.found.window), self.found.window)
            write_imatrix(self.imatrix, self.checkpoint.config, self.found.sums, text)
        self.weights = read_imatrix(self.imatrix, self.checkpoint.config)

    def _calibrated(self, ids: list[int]) -> Calibration:
        """The measurements on the text, kept with the errors of the formats."""
        path, started = self.work / f"calibration-{len(ids)}.pickle", time.perf_counter()
        if path.exists():
            found, self.errors = pickle.loads(path.read_bytes())  # our own file
            assert isinstance(found, Calibration), "what was kept"
            return found
        found = calibrate(self.checkpoint, ids, errors=Both(*self.errors.values()), moments=True)
        print(f"calibrated on {len(ids)} tokens: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        path.write_bytes(pickle.dumps((found, self.errors)))
        return found

    def ours(self, name: str, **how: object) -> tuple[Path, float]:
        """A conversion of ours, and how long it took (0: it was there)."""
        path, started = self.work / name, time.perf_counter()
        if path.exists():
            return path, 0.0
        write(self.checkpoint, path, **how)  # type: ignore[arg-type]
        return path, time.perf_counter() - started

    def theirs(self, kind: str) -> tuple[Path, float]:
        """llama-quantize's file."""
        path, started = self.work / f"llama-{kind}-imatrix.gguf", time.perf_counter()
        if path.exists():
            return path, 0.0
        command = (self.args.quantize, "--imatrix", self.imatrix, self.base, path, kind)
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        return path, time.perf_counter() - started

    def budget(self, to: str, size: int, name: str) -> tuple[Path, float, float]:
        """The best mix of formats that fits, and the divergence it should have."""
        rest, fixed = recipe_rest(self.checkpoint, to)
        candidates = self.errors[to].candidates()
        recipe = choose(candidates, size, fixed)
        cost = sum(one.error for unit, options in candidates.items() for one in options if one.format == recipe[unit])
        how = {"to": to, "gguf_format" if to == "gguf" else "format": recipe | rest}
        return *self.ours(name, **how, importance=self.found.importance), cost

    def variants(self) -> Iterator[tuple[Path, float, float | None]]:
        """Every file, of each type in turn."""
        for kind in self.args.types:
            low = kind.lower()
            reference, seconds = self.theirs(kind)
            yield reference, seconds, None
            if low in self.args.alike:
                how = {"to": "gguf", "gguf_format": low}
                yield *self.ours(f"ours-{low}-imatrix.gguf", **how, importance=self.weights), None
                yield *self.ours(f"ours-{low}-feedback.gguf", **how, importance=self.found.importance), None
            yield self.budget("gguf", reference.stat().st_size, f"ours-{low}-budget.gguf")
            if self.args.packed:
                yield self.budget("quadriga", weight_bytes(reference), f"ours-{low}-packed")
        columns = {name: columns_of(one) for name, one in self.found.importance.items()}
        for form in self.args.formats:
            for label, importance in (("plain", {}), ("columns", columns), ("feedback", self.found.importance)):
                yield *self.ours(f"ours-{form}-{label}", format=form, importance=importance), None
        for size in self.args.sizes:
            yield self.budget("quadriga", int(size * 1e6), f"ours-{size:g}MB-packed")


def windows(model: quadriga.LLM, text: Path, window: int, n: int) -> list[list[int]]:
    """The first ``n`` windows of the text's tokens."""
    assert model.tokenizer is not None, "a text needs a tokenizer"
    ids = model.tokenizer.encode(text.read_text(encoding="utf-8"))
    return [ids[i : i + window] for i in range(0, min(len(ids), window * n) - window + 1, window)]


def main() -> None:
    """Make and measure every file; print a row for each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--calibrate-tokens", type=int, default=16384)
    parser.add_argument("--quantize", default="llama-quantize")
    parser.add_argument("--types", nargs="*", default=["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M"])
    parser.add_argument("--alike", nargs="*", default=["q2_k", "q3_k_m", "iq4_xs", "q4_k_m", "q5_k_m"])
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--formats", nargs="*", default=[])
    parser.add_argument("--sizes", type=float, nargs="*", default=[])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--work", default="quality")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    maker = Maker(args)
    base = quadriga.load(str(maker.base), format="float32")
    parts = windows(base, args.text, args.window, args.windows)
    expected = [base.logits(part) for part in parts]
    numbers = weight_bytes(maker.base) / 4
    rows: list[tuple[str, ...]] = []
    out = csv.writer(sys.stdout)
    out.writerow(COLUMNS)
    for path, seconds, cost in maker.variants():
        model = quadriga.load(str(path), format="float32" if path.is_file() else "keep")
        pairs = zip(expected, parts, strict=True)
        found = divergence.summed([divergence.measured(right, model.logits(part), part) for right, part in pairs])
        value = {name: figure for name, (figure, _) in found.figures.items()}
        size = weight_bytes(path)
        rows.append(
            (
                path.name, str(size), f"{8 * size / numbers:.3f}", f"{value['perplexity']:.3f}",
                f"{value['mean KL']:.5f}", f"{value['KL, 99.9 %']:.3f}",
                f"{value['same most probable token, %']:.2f}", "" if cost is None else f"{cost:.5f}", f"{seconds:.0f}",
            )
        )  # fmt: skip
        out.writerow(rows[-1])
        sys.stdout.flush()
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    print(f"{sum(len(part) - len(part) // 2 - 1 for part in parts)} tokens scored", file=sys.stderr)


if __name__ == "__main__":
    main()
