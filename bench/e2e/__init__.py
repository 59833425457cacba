"""Benches of whole training steps."""
