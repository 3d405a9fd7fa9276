"""Jobs that write into a database: read what others made, encode, customize, score."""
