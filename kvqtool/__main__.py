"""`python -m kvqtool`."""

from kvqtool.cli import main

if __name__ == "__main__":
    main()
