"""The engineer's doors: audits of a transfer set, and of a student."""
