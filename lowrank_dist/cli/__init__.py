"""`lowrank-dist`: the commands that need no launcher. Thin: each one calls the room that does the work."""
