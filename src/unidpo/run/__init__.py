"""A recipe → a finished run folder."""
