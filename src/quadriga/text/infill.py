"""Filling in the middle: the marks that models trained for it put around what stands before and behind.

    <|fim_prefix|> before <|fim_suffix|> behind <|fim_middle|>    ─► what is missing        most of them
    [SUFFIX] behind [PREFIX] before                               ─► what is missing        Codestral

The names are those of the models' own vocabularies. That a vocabulary has them does not say how well a model was
trained to use them.
"""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens around the two texts."""

    before: int
    after: int
    middle: int | None
    """None: what is behind comes first, and the answer follows what is before."""

    def prompt(self, tokenizer: Tokenizer, before: str, after: str, begun: str = "") -> list[int]:
        """Token ids of the question. Names of special tokens in the texts are text.

        Args:
            begun: how the answer begins.
        """
        first = [self.before, *tokenizer.encode(before, allow_special=False)]
        second = [self.after, *tokenizer.encode(after, allow_special=False)]
        whole = [*second, *first] if self.middle is None else [*first, *second, self.middle]
        start = tokenizer.encode(begun, allow_special=False) if begun else []
        return [*tokenizer.prefix_ids, *whole, *start]


_NAMES: tuple[tuple[str, str, str | None], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # DBRX, Qwen2.5-Coder, Granite 4
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite code
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("[PREFIX]", "[SUFFIX]", None),  # Codestral
)


def marks_of(tokenizer: Tokenizer) -> Marks | None:
    """A vocabulary's marks; None where it has none."""
    special = {**{token.content: token.id for token in tokenizer.added}, **tokenizer.special_ids}
    for before, after, middle in _NAMES:
        if before in special and after in special and (middle is None or middle in special):
            return Marks(special[before], special[after], None if middle is None else special[middle])
    return None
