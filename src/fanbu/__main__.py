"""``python -m fanbu``."""

from fanbu.cli import main

main()
