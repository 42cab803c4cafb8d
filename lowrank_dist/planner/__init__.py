"""The cost of a run by closed formulas: parameters, memory, messages, FLOPs, time, layouts.

The formulas read the architecture and the placement of factors (arch/). They import neither torch nor the training
code, so a plan is computed at once. engine/plan.py plans a run, and engine/verification.py checks a plan against the
training code. A method describes what it adds in its footprint (job.Footprint).
"""
