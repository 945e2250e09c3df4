"""A model, its packs, and the log-probabilities of responses under it."""
