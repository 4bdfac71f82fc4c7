"""Defences that change the distillation itself, one file each."""
