"""The device mesh, how arrays are sharded over it, and the processes of a run."""
