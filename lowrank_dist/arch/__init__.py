"""The description of a model: families, config.json, sizes, linears, tensor names, published shapes, factor placement.

Plain Python that imports only errors.py and untrusted/ of this package. The model, the plan, merging and export read
it.
"""
