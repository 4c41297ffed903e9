"""Measures speed and memory: cases, peers, timing, reports."""
