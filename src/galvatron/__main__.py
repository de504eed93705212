"""``python -m galvatron``: the command line."""

from galvatron.cli import main

main()
