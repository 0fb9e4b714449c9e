"""``python -m mixmerge.cli``."""

from mixmerge.cli import main

main()
