"""What each feature does: an index built once from cached activations, read by pages, notebooks and search."""
