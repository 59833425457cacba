"""Timings: ops against what people run today, and whole training steps.  See bench/README.md."""
