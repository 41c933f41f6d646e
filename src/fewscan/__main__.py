"""``python -m fewscan`` is the command line."""

from fewscan.cli import main

if __name__ == "__main__":
    main()
