"""Process topology, collectives and the low-rank parallel linears."""
