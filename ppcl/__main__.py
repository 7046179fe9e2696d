"""``python -m ppcl``, for launchers that start modules."""

from ppcl.cli import main

if __name__ == "__main__":
    main()
