"""``python -m saelab`` and ``torchrun -m saelab``."""

from saelab.cli import main

if __name__ == "__main__":
    main()
