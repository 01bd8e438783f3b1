"""The commands of ViLD/."""
