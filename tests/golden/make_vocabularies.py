"""Make vocabularies.json with transformers 4.57.6: what its fast tokenizers make of the folders in vocabularies.py.

python -m venv env && env/bin/pip install torch==2.13.0 transformers==4.57.6 sentencepiece protobuf
env/bin/python tests/golden/make_vocabularies.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import transformers
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "src"))
from tests.golden.vocabularies import FOLDERS, TEXTS, write


def main() -> None:
    """One entry a folder: ids and decoded text of every text, and the ids of tokens with a role."""
    made: dict[str, object] = {}
    for name in FOLDERS:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text('{"model_type": "llama"}')
            tokenizer = AutoTokenizer.from_pretrained(write(name, Path(folder)))
        ids = [tokenizer(text)["input_ids"] for text in TEXTS]
        made[name] = {
            "ids": ids,
            "texts": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
            "roles": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        }
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in made.items())
    text = f'{{\n "transformers": "{transformers.__version__}",\n "folders": {{\n{rows}\n }}\n}}\n'
    (Path(__file__).parent / "vocabularies.json").write_text(text)


if __name__ == "__main__":
    main()
