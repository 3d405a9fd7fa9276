"""Counterfactual truth: what a model would be without some of its exemplars, by training it again, see `queue`."""
