"""``python -m kr_fast`` and ``accelerate launch -m kr_fast``."""

import sys

from kr_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
