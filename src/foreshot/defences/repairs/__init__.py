"""Repairs mend a student after it was distilled, one file each."""
