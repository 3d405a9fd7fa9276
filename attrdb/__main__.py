"""`python -m attrdb` is the command line `attrdb`."""

from attrdb.cli import main

main(prog_name="attrdb")
