"""What a run will take and cost, by closed formulas: parameters, memory, messages, FLOPs, time, layouts.

The formulas import neither torch nor the code they describe, so a plan answers at once and is a second opinion on that
code. Only `verify` runs it, on fake tensors, and holds it against the formulas.
"""
