"""``python -m trajstore``: the command line, where its script is not on the path."""

from trajstore.cli import main

main()
