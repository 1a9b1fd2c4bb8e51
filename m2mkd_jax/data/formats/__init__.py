"""Layouts of data sets on disk, one file each; layouts.py tells them apart and opens them."""
