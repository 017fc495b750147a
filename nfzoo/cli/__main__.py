"""`python -m nfzoo.cli` is `nfzoo`."""

from nfzoo.cli import main

main()
