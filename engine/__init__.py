"""What makes the seven scripts run on a machine: fast forms of two of their functions,
lack of memory, the optimizer. Nothing in this folder changes a number."""
