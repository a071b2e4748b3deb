"""``python -m quadriga``: the same as the ``quadriga`` command."""

from quadriga.cli import main

if __name__ == "__main__":
    main()
