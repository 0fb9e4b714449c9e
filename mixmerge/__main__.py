"""``python -m mixmerge``."""

from mixmerge.cli import main

main()
