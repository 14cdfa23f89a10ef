"""From records to examples and back to scores: a small file for each task."""
