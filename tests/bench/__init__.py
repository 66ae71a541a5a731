"""Measures nbdserve side by side with the stock servers, in one run, with fio: ``python -m tests.bench``."""
