"""One file per question that the documentation answers with a figure."""
