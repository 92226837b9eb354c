"""House-keeping: flags, files, checkpoints, run folders, pictures. Nothing here is about GRPO."""
