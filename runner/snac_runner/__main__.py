"""`python -m snac_runner` is the command line `runner`."""

from snac_runner.cli import main

if __name__ == "__main__":
    main()
