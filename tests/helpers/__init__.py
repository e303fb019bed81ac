"""What tests share. Fixtures are in `conftest.py`; nothing is imported from a test."""
