"""What a run will take and cost, by closed formulas: parameters, memory, messages, FLOPs, time, layouts.

The formulas import neither torch nor the code they describe, so a plan answers at once and is a second opinion on that
code: engine/dry_run runs the planned step on fake tensors and holds it against them. What a method adds, its footprint
says (job.Footprint).
"""
