"""Which tokens begin and end a text or an answer: the roles that the files give them, or their class has by default."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from quadriga.errors import TokenizerError
from quadriga.text.added_tokens import Declared
from quadriga.text.tokenizer.files import Folder

logger = logging.getLogger(__name__)


def roles_of(
    tokens: Declared, token_id: Callable[[str], int | None], left_out: frozenset[str], name: str
) -> dict[str, int]:
    """The ids of the tokens that begin and end texts and fill up lines.

    Raises:
        TokenizerError: a bos or eos token that does not exist.
    """
    found: dict[str, int] = {}
    for role in ("bos_token", "eos_token", "pad_token"):
        text = tokens.roles.get(role)
        if text is None or text in left_out:
            continue
        if (i := token_id(text)) is not None:
            found[role] = i
        elif role == "pad_token":  # transformers would make one up, which the model has no row for
            logger.warning("tokenizer_config.json names pad_token %r, which is not in %s: left out", text, name)
        else:
            raise TokenizerError(f"tokenizer_config.json names {role} {text!r}, which is not in {name}")
    for role, text in tokens.usual.items():
        if (i := token_id(text)) is not None:
            found[role] = i
    return found


def ends_of(folder: Folder, eos: int | None, special_ids: Mapping[str, int]) -> list[int]:
    """Ids that end an answer."""
    ends = [*([] if eos is None else [eos]), *folder.generation_eos]
    chatml = "<|im_end|>" in special_ids and "<|im_start|>" in special_ids
    if chatml and folder.templates.chat and "<|im_end|>" in folder.templates.chat:
        ends.append(special_ids["<|im_end|>"])  # ChatML: the end of a turn ends an answer (DBRX's generation config)
    return ends


_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Classes of transformers that put bos before every text unless told otherwise, whatever the post-processor says."""


def asked_for(folder: Folder, has_bos: bool, prefix: list[int], suffix: list[int]) -> tuple[bool, bool]:
    """Whether a bos token goes before a text, and an eos token after it.

    As transformers has it: LLaMA's classes go by their flags alone, the general class by the file's post-processor.
    The class is the one that tokenizer_config.json names, or that a model of this type has; of the latter nothing is
    asked that the vocabulary has not (``has_bos``).
    """
    config = folder.config
    if folder.kind == "PreTrainedTokenizer" and (prefix or suffix):
        return bool(prefix), bool(suffix)
    llama = folder.kind in _LLAMA_CLASSES and (has_bos or "tokenizer_class" in config)
    bos = bool(config.get("add_bos_token", True if llama else prefix))
    return bos, bool(config.get("add_eos_token", False if llama else suffix))


def logged_suffix(ids: list[int], name: str) -> list[int]:
    """``ids``, which go after every plain prompt, with a logged line if there are any: few models are used so."""
    if ids:
        message = "%s puts the end token %s after every prompt: a plain prompt's answer begins after an end"
        logger.warning(message, name, ids)
    return ids
