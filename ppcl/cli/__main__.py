"""Allow ``python -m ppcl.cli``."""

from ppcl.cli import main

main()
