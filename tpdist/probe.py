"""`python -m tpdist.probe --json`: the probe in a process of its own, so that its caller needs no torch."""

from tpdist.preflight.probe import main

if __name__ == "__main__":
    main()
