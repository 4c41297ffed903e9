"""One command for each question that the documentation answers with a figure."""
