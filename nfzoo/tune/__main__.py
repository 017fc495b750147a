"""A worker process of a scan, started by `nfzoo.tune.workers`."""

import sys

from nfzoo.tune.workers import main

if __name__ == "__main__":
    sys.exit(main())
