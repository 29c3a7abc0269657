"""Selection on a GPU, shared by the encoders: the k largest of a row of candidates, the n-th largest of a whole batch."""
