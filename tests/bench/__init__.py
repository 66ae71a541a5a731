"""Measures nbdserve side by side with the stock servers, in one run: ``python -m tests.bench``."""
