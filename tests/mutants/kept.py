"""The kept list of wrong changes: one line each, by room, and the tests that must fail for it.

    [[mutant]]
    name = "what is wrong then"
    file = "src/quadriga/..."          the file that is changed
    old = "..."                        a fragment that occurs in it exactly once
    new = "..."                        what stands there instead
    tests = ["tests/..."]              what must fail; files or node ids, small and quick ones

A room is a file of this folder, ``kernels.toml`` and so on. ``make mutate`` applies them one by one
(``python -m tests.mutants``); ``tests/mutants/test_kept.py`` sees in every run of the tests that the list still fits the code.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One wrong change."""

    room: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def compiled(self) -> bool:
        """True if the kernels' library must be built anew."""
        return not self.file.endswith(".py")

    def applied(self, root: Path = ROOT) -> str:
        """The file's text with the change.

        Raises:
            ValueError: the fragment is not there exactly once.
        """
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.room}: {self.name}: the old fragment must occur in {self.file} once, it occurs "
                f"{text.count(self.old)} times. Change the entry with the code, or take it out with the reason."
            )
        return text.replace(self.old, self.new)


def rooms() -> list[str]:
    """The names of all rooms."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(room: str) -> list[Mutant]:
    """The mutants of a room, in the order of their files."""
    entries = tomllib.loads((FOLDER / f"{room}.toml").read_text())["mutant"]
    mutants = [Mutant(room=room, **{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    return sorted(mutants, key=lambda mutant: mutant.file)
