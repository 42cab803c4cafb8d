"""Job scripts for Slurm, made from the templates in launch/slurm."""
