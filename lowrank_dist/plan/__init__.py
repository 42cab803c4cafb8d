"""What a run will take and cost, by closed formulas: parameters, memory, messages, FLOPs, time, layouts.

The formulas read the architecture and the placement of factors (arch/), and import neither torch nor the code that
trains: a plan answers at once, and engine/dry_run.py holds it against that code. What a method adds, its footprint says
(job.Footprint).
"""
