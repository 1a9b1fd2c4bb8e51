"""The training step and loop, the optimizer and its schedule, mixing and erasing."""
