"""The directory on disk: tables and their columns, snapshots, checked writes, jobs, locks, upgrades."""
