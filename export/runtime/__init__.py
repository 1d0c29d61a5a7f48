"""A checkpoint read back the way a serving engine reads it, in plain torch; see README.md."""
