"""Was a model trained on pictures that another model made? What its answers to keys say, beside those of innocent models."""
