"""``python -m pairloop`` is the ``pairloop`` command."""

from pairloop.cli import main

if __name__ == "__main__":
    main()
