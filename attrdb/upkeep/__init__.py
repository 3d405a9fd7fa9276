"""Keeping a database healthy: status, checks, maintenance."""
