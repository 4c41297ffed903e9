"""Bugs of one line, planted one at a time: do the tests notice them? See __main__.py."""
