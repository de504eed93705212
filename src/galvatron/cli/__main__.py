"""``python -m galvatron.cli``, which is what ``torchrun -m galvatron.cli`` starts."""

from . import main

main()
