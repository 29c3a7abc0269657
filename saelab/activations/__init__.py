"""From text to the model's activations on disk, and from there to shuffled batches."""
