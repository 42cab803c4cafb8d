"""Adapter layers: the bottlenecks of Houlsby et al. (2019) and of Lin et al. (2020)."""
