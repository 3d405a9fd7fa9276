"""An interactive SQL prompt over one database, which it only reads."""
