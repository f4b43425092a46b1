"""`tpdist` and `python -m tpdist`."""

import sys

from tpdist.cli.frame import run


def main() -> None:
    sys.exit(run())


if __name__ == "__main__":
    main()
