"""The one engine."""
