"""Customization: fine-tuning a base model on exemplars, by any method, and drawing samples from it."""
