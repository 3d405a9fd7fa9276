"""Answers of models to prompts, as files: reading and drawing them, choosing keys by them, and storing them."""
