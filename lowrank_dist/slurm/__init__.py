"""Job scripts for Slurm: layout.py says which jobs fit, template.py fills the EDIT block of one in launch/slurm."""
