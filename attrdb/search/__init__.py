"""Finding the most similar candidates: exactly by matrix products, or through an index."""
