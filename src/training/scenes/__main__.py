"""``python -m training.scenes``: draw a data set of generated scenes."""

import sys

from training.scenes.generate import main

if __name__ == "__main__":
    sys.exit(main())
