"""Selection on a GPU: the k largest of each row of candidates, and the n-th largest of a whole batch."""
