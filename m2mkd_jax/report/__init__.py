"""Pages that show runs: what was done, how well it went, and what the networks do."""
