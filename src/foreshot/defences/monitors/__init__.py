"""Monitors look at what a student is asked once it is in use, one file each."""
