"""From batches of activations to a trained sparse autoencoder."""
