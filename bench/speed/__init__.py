"""What measures speed and memory: cases, peers, timing, reports."""
