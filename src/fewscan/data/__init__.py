"""From disk to cases."""
