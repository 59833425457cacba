"""One bench per op."""
