"""Customized models: their settings, the making of one, and a queue of many."""
