"""What is computed once and kept on disk: log-probabilities of the reference, features of images."""
