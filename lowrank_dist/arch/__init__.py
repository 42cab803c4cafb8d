"""What a model is: families, config.json, sizes, linears, tensor names, published shapes, placement of factors.

Plain Python that imports nothing of ours but errors.py: the model, the plan, merging and export all read it.
"""
