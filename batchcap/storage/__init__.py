"""Whole files, locks and object stores. Knows no formats."""
