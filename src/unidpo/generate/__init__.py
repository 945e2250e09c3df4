"""Questions to answers, greedy or sampled, from a model here or behind a server: the one place that generates."""
