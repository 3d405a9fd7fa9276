"""Taking images out: choosing them, what hangs on them, deleting it in an order that a kill cannot spoil, purging files."""
