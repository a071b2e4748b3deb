"""Text to ids and back: one :class:`Tokenizer` over tiktoken ranks, tokenizer.json, SentencePiece and GGUF.

load         which of them a checkpoint's folder holds     files   reads them, bounded in size and depth
tiktoken | ranks | huggingface | sentencepiece | gguf      roles   which tokens begin and end a text
base         Tokenizer itself
"""

from quadriga.text.tokenizer.base import Tokenizer, Vocabulary
from quadriga.text.tokenizer.files import (
    FILES,
    TOOL_TEMPLATE,
    chat_templates,
    read_bytes,
    read_json,
    read_json_if_there,
)
from quadriga.text.tokenizer.gguf import TOOL_TEMPLATE as GGUF_TOOL_TEMPLATE
from quadriga.text.tokenizer.gguf import load_gguf
from quadriga.text.tokenizer.huggingface import load_tokenizer_json
from quadriga.text.tokenizer.load import load_directory, tokenizer_json
from quadriga.text.tokenizer.sentencepiece import load_sentencepiece
from quadriga.text.tokenizer.tiktoken import TiktokenVocabulary, load_tiktoken

__all__ = [
    "FILES",
    "GGUF_TOOL_TEMPLATE",
    "TOOL_TEMPLATE",
    "TiktokenVocabulary",
    "Tokenizer",
    "Vocabulary",
    "chat_templates",
    "load_directory",
    "load_gguf",
    "load_sentencepiece",
    "load_tiktoken",
    "load_tokenizer_json",
    "read_bytes",
    "read_json",
    "read_json_if_there",
    "tokenizer_json",
]
