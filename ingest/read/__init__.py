"""Reading what others made: picture folders, WebDataset shards, embeddings, the AbC release."""
