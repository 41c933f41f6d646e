"""Is it good, and how sure are we."""
