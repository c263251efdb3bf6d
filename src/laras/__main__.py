"""`python -m laras` is the `laras` command."""

from laras.cli.main import main

main()
