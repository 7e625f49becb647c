"""`python -m vitrail` is the `vitrail` command."""

from vitrail.cli import main

if __name__ == "__main__":
    main()
