"""Files: which ones are read, how they are written, and who may write."""
