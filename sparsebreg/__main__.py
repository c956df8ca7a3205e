import sys

from sparsebreg.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
