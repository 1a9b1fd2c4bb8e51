"""Accuracy, evaluation on a part of the classes, and counts of FLOPs and activation memory."""
