"""``quadriga diff``: two runs of ``quadriga eval``, item by item."""

from __future__ import annotations

import sys

from quadriga.cli import options


def diff_command(
    a: options.RunA,
    b: options.RunB,
    json: options.Json = False,
) -> None:
    """Show which items two runs answered differently, and whether that may be chance.

    p is the exact sign test's over the items that flipped: how likely a split at least as uneven is between equals.
    """
    from quadriga.cli.eval import print_table
    from quadriga.evaluate import flips

    found = flips.compare(a, b)
    if json:
        print(options.as_json({"tasks": [flips.as_json(one) for one in found]}))
        return
    print_table(flips.summary(found))
    print()
    print_table(flips.listed(found))
    for one in found:
        if not one.same_prompts:
            print(f"{one.task}: the same questions in other prompts", file=sys.stderr)
