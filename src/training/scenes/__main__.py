"""``python -m training.scenes``: draw a data set of generated scenes."""

from training.scenes.generate import main

if __name__ == "__main__":
    main()
