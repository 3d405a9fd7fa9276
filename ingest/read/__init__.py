"""Reading what others made: folders of pictures, tables, webdataset shards, embeddings, the AbC release."""
