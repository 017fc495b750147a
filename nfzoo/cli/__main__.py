"""`python -m nfzoo.cli` is `nfzoo`."""

from nfzoo.cli import main

if __name__ == "__main__":
    main()
