"""`python -m foreshot` is the same as `foreshot`."""

from foreshot.cli import main

if __name__ == "__main__":
    main()
