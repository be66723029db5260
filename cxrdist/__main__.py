import sys

from cxrdist.cli import main

if __name__ == "__main__":
    sys.exit(main())
