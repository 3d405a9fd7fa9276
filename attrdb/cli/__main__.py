"""python -m attrdb.cli"""

from attrdb.cli import main

main()
