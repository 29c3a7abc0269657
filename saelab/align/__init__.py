"""From preferences to an aligned model: records, log-probabilities, losses, and a readable trainer for each method."""
