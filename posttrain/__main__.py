"""`python -m posttrain`, which is also what `accelerate launch -m posttrain` starts."""

import sys

from posttrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
