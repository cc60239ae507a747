"""`python -m mmcompress` is the `mmcompress` command."""

from .cli import main

main()
