"""`lowrank-dist`: the commands beside training. Thin: each one calls the room that does the work."""
